"""The tokenizer's machine code, made ahead: when an image is built, and not when it runs."""

from ..errors import UserError


def tokenizer_warm() -> None:
    """Compile all of the tokenizer's loops for this machine, so that no later start has to."""
    import time

    from ..tokenizer.compiled import jit, store

    folder = store.place()
    if folder is None:
        raise UserError("no folder for machine code can be written to: name one by NUMBA_CACHE_DIR")
    start = time.perf_counter()
    num_compiled = jit.load(jit.ALL)
    seconds = time.perf_counter() - start
    num_copied = store.gather(folder)
    copied = f"; {num_copied} came from other folders" if num_copied else ""
    if num_compiled:
        print(f"compiled {num_compiled} functions in {seconds:.1f} s, kept in {folder}{copied}")
    else:
        print(f"all {len(jit.ALL)} functions are in {folder}, and load in {seconds:.1f} s{copied}")
