"""THE WORK: torch lives here. Reads a run folder, writes a run folder. Importing this package loads no torch."""

from luthier.settings import bound_kernel_caches

bound_kernel_caches()  # here, because every way to torch leads through this package
