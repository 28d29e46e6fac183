"""The command line of mpi-mlx; it shows what the library ``mpi_mlx`` reports."""
