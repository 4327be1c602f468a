"""Where a codec's files are: in a local folder, in Hugging Face's cache, or on its hub."""
import pathlib


def find_file(source, *names):
    """The path of the first of these files that `source`, a folder or a Hugging Face id, has. HF_HOME and offline mode
    are honoured. Raises FileNotFoundError, or another OSError where the hub cannot be reached."""
    folder = pathlib.Path(source)
    if folder.is_dir():
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise FileNotFoundError(f"no {' or '.join(names)} there")
        return there[0]
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # only where it is used
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    cached = [path for path in (try_to_load_from_cache(source, name) for name in names) if isinstance(path, str)]
    if cached:  # so that no network is needed, whichever of the names it is
        return pathlib.Path(cached[0])
    for name in names:
        try:
            return pathlib.Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError:
            raise OSError("the hub cannot be reached, and its cache does not hold it") from None
        except EntryNotFoundError:
            pass
    raise FileNotFoundError(f"it has no {' or '.join(names)}")
