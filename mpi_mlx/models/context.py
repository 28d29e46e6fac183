"""How long a sequence a model takes, by its own config."""

from __future__ import annotations

from mpi_mlx.errors import DataError


def context_length(model) -> int | None:
    """The longest sequence that the model's config allows; None where it does not say.

    It is the maximum as stated: a sliding window bounds what a layer sees, not what the model takes, and a scaled
    rotary embedding's factor is in the number already or was not wanted.
    """
    config = model.config
    for scope in (config.get("text_config") or {}, config):
        length = scope.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_context(model, tokens: int, where: str, *, document: int = 0, completion: int = 0, advice: str) -> None:
    """Whether the model takes ``tokens``, of which ``document`` are the document's and ``completion`` are to come.

    Raises:
        DataError: they are more than :func:`context_length`. ``where`` is too long, and ``advice`` what to change.
    """
    limit = context_length(model)
    if limit is None or tokens <= limit:
        return
    parts = [f"{document:,} of them the document's"] if document else []
    parts += [f"{completion:,} for a completion"] if completion else []
    told = f" ({', '.join(parts)})" if parts else ""
    raise DataError(
        f"{where}: {tokens:,} tokens{told}, and {model.base} takes {limit:,} (max_position_embeddings); {advice}, or "
        "choose a base with a longer context"
    )
