"""Work done ahead of time."""
import collections
import concurrent.futures
import itertools


def prefetched(read, jobs, threads=4, ahead=8):
    """Yield read(job) for each job, in order, up to `ahead` of them done beforehand by threads. Reading files, decoding
    JPEG and copying arrays all happen outside Python's lock, so threads are enough. An error is raised in its turn."""
    jobs = iter(jobs)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        waiting = collections.deque(pool.submit(read, job) for job in itertools.islice(jobs, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, job) for job in itertools.islice(jobs, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
