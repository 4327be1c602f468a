"""A CSV table of results that grows by whole rows, so that a sweep which was interrupted can continue."""
import csv
import os

from lib.run import BadInput, atomic, rank
from lib.samples import saving


def read_rows(path, columns):
    """The rows, as {column: text}; none where there is no file. Raises BadInput where it is another kind of table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames
    except FileNotFoundError:
        if not os.access(path.absolute().parent, os.W_OK):
            raise BadInput(f"{path}: its folder does not exist or cannot be written to") from None
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read as a table of scores ({error})") from None
    if tuple(header or ()) != tuple(columns) or any(None in row or None in row.values() for row in rows):
        raise BadInput(f"{path}: not a table of these scores: choose another --csv")
    return rows


def append_rows(path, columns, rows):
    """Add rows, by rank 0. The whole file is written anew and takes the place of the old one: never half a row."""
    if rank() == 0:
        rows = read_rows(path, columns) + rows
        with saving(path), atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
