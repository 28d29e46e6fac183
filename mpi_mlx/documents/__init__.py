"""The agent's rulebook: reading it, hashing it, amending it, placing it in a conversation."""

from mpi_mlx.documents.images import open_image
from mpi_mlx.documents.load import PolicyDocument, from_parts, from_text, load_document, unread_files
from mpi_mlx.documents.passages import passages
from mpi_mlx.documents.place import place_document

__all__ = [
    "PolicyDocument", "from_parts", "from_text", "load_document", "open_image", "passages", "place_document",
    "unread_files",
]
