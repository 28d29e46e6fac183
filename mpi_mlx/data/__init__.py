"""Examples, their files, and the built-in benchmarks."""

from mpi_mlx.data.completion import completion_text, split_completion
from mpi_mlx.data.dataset import Dataset, load_dataset
from mpi_mlx.data.examples import Example, load_examples
from mpi_mlx.data.write import write_examples

__all__ = [
    "Dataset", "Example", "completion_text", "load_dataset", "load_examples", "split_completion",
    "write_examples",
]
