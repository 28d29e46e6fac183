import random
import threading

import pytest

from mpi_mlx.serving.engine import Busy, Engine, Job
from mpi_mlx.serving.session import ChatSession


class Collected:
    """What a job emitted, and whether it is over."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, kind, *values):
        self.events.append((kind, *values))
        if kind in ("end", "error"):
            self.over.set()

    @property
    def text(self):
        return "".join(event[1] for event in self.events if event[0] == "text")


def job(question, emit, variant="base", max_tokens=12, **options):
    messages = [{"role": "user", "content": question}]
    return Job(
        lambda model: model.encode(messages, generation_prompt=True), emit, variant, max_tokens, **options
    )


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    import mlx.core as mx
    from mlx.utils import tree_map

    from mpi_mlx.models import load_model
    from mpi_mlx.models.adapters import save_adapter
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.recipe import LoraSpec

    model = load_model(tiny_folder)
    attach_lora(model, LoraSpec(rank=2, alpha=8, targets=["q_proj", "down_proj"]))
    mx.random.seed(5)
    model.net.update(tree_map(lambda p: p + mx.random.normal(p.shape), model.net.trainable_parameters()))
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def engine(tiny_folder, adapter):
    from mpi_mlx.models import load_model

    engine = Engine(
        lambda: load_model(tiny_folder), {"base": None, "agent": adapter}, max_rows=3, max_queue=20
    )
    yield engine.start()
    engine.close()


def alone(tiny_folder, question, adapter=None, max_tokens=12):
    from mpi_mlx.models import load_model

    session = ChatSession(load_model(tiny_folder, adapter=adapter), max_tokens=max_tokens)
    return "".join(session.ask(question))


def test_a_batch_answers_as_each_request_alone(engine, tiny_folder, adapter):
    asked = [("How many red cubes are there?", "base", 12), ("yes", "agent", 9), ("If any blue", "base", 5),
             ("no", "base", 14), ("refuse", "agent", 7)]  # fmt: skip
    found = [Collected() for _ in asked]
    for (question, variant, most), emit in zip(asked, found, strict=True):
        engine.submit(job(question, emit, variant, most))
    for (question, variant, most), emit in zip(asked, found, strict=True):
        assert emit.over.wait(60)
        assert emit.text == alone(tiny_folder, question, adapter if variant == "agent" else None, most)
        assert emit.events[0][0] == "begin" and emit.events[-1][0] == "end"


def test_rows_of_every_length_and_adapter_at_once(tiny_folder, adapter):
    """Places of ended rows are taken over, long rows and other adapters have batches beside the others'."""
    from mpi_mlx.models import load_model

    draw = random.Random(3)
    pool = "the red blue green cube sphere largest small left right colour answer yes no".split()
    asked = [
        (" ".join(draw.choices(pool, k=600 if n in (3, 9) else draw.randrange(1, 60))),
         "agent" if n % 3 == 1 else "base", draw.randrange(2, 120))
        for n in range(24)
    ]  # fmt: skip
    engine = Engine(lambda: load_model(tiny_folder), {"base": None, "agent": adapter}, max_rows=8)
    found, seen = [Collected() for _ in asked], set()
    join = engine._join
    engine._join = lambda *row: (join(*row), seen.add(tuple(b.variant for b in engine._batches)))
    engine.start()
    for (question, variant, most), emit in zip(asked, found, strict=True):
        engine.submit(job(question, emit, variant, most))
    sessions = {
        "base": ChatSession(load_model(tiny_folder)), "agent": ChatSession(load_model(tiny_folder, adapter=adapter))
    }  # fmt: skip
    for (question, variant, most), emit in zip(asked, found, strict=True):
        assert emit.over.wait(60)
        session = sessions[variant]
        session.reset()
        session.max_tokens = most
        assert emit.text == "".join(session.ask(question)), (question, variant)
    engine.close()
    assert engine.active == 0
    assert any({"base", "agent"} <= set(batches) for batches in seen)  # neither waited for the other
    assert any(len(batches) > len(set(batches)) for batches in seen)  # a long row among short ones


def test_prefixes_are_shared_by_adapter_only(engine):
    question = "If any object is blue then refuse, otherwise say the colour"
    for variant, known in (("base", False), ("base", True), ("agent", False)):
        emit = Collected()
        engine.submit(job(question, emit, variant))
        assert emit.over.wait(60)
        _, tokens, cached, _ = emit.events[0]
        assert (cached == tokens - 1) if known else (cached < 30), (variant, cached, tokens)


def test_cancelled_and_refused_and_too_long(engine):
    emit = Collected()
    long = job("yes", emit, max_tokens=1500, temperature=1.0, seed=3)
    engine.submit(long)
    engine.cancel(long)
    assert emit.over.wait(60)
    assert emit.events[-1] in (("end", "cancelled"), ("end", "stop"))
    emit = Collected()
    engine.submit(job("yes no " * 2500, emit))
    assert emit.over.wait(60)
    assert "at most 2,047" in str(emit.events[0][1])
    before = engine.max_queue, engine.max_rows
    engine.max_queue = engine.max_rows = 0
    with pytest.raises(Busy, match="waiting"):
        engine.submit(job("yes", Collected()))
    engine.max_queue, engine.max_rows = before


def test_places_are_no_queue(tiny_folder):
    """Without a queue, as many are taken as are answered together."""
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"base": None}, max_rows=2, max_queue=0).load()
    found = [Collected() for _ in range(3)]
    for emit in found[:2]:
        engine.submit(job("yes", emit))
    with pytest.raises(Busy, match="0 requests are being answered, 2 waiting"):
        engine.submit(job("yes", found[2]))
    engine._admit()
    assert (engine.active, engine.waiting) == (2, 0)
    with pytest.raises(Busy, match="2 requests are being answered, 0 waiting"):
        engine.submit(job("yes", found[2]))
    engine.close()
    engine.work()
    assert [bool(emit.events) for emit in found] == [True, True, False]


def test_what_fails_is_logged_and_nothing_of_it_kept(tiny_folder, caplog):
    from mpi_mlx.errors import ServingError
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"base": None}).load()

    def broken(*_):
        raise RuntimeError("no memory in layer 7")

    def refused(model):
        raise ServingError("not this")

    def run(emit, one):
        engine.submit(one)
        engine._admit()
        return emit.events

    emit = Collected()
    assert run(emit, Job(refused, emit, "base", 4))[-1][0] == "error"
    assert not caplog.records and engine.counters.failed == 0  # the client's own fault
    engine._draw, draw = broken, engine._draw
    emit = Collected()
    assert run(emit, job("yes", emit))[-1][0] == "error"
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "no memory in layer 7" in caplog.text
    engine._draw = draw
    emit = Collected()
    assert run(emit, job("yes", emit))[0][0] == "begin" and len(engine.prefixes) == 1
    caplog.clear()
    engine._draw = broken
    engine.close()
    engine.work()
    assert emit.events[-1][0] == "error" and "1 answers failed" in caplog.text and "layer 7" in caplog.text
    assert len(engine.prefixes) == engine.prefixes.used_bytes == 0 and engine.counters.failed == 2


def test_closing_finishes_what_was_asked(tiny_folder):
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"base": None}).start()
    found = [Collected() for _ in range(4)]
    for emit in found:
        engine.submit(job("yes", emit))
    engine.close()
    assert all(emit.events[-1][0] == "end" for emit in found)
    with pytest.raises(Busy, match="stopping"):
        engine.submit(job("yes", Collected()))


def test_kept_prefixes_take_what_they_say(tiny_folder):
    """A row taken out of the batch must not keep the whole batch's arrays alive."""
    import mlx.core as mx

    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"base": None}, max_rows=32).start()
    before = mx.get_active_memory()
    found = [Collected() for _ in range(32)]
    for index, emit in enumerate(found):
        engine.submit(job(f"{index} yes", emit, max_tokens=2 + index))
    assert all(emit.over.wait(60) for emit in found)
    engine.close()
    grown = mx.get_active_memory() - before
    assert len(engine.prefixes) == 32 and grown < 1.3 * engine.prefixes.used_bytes + (1 << 20), (
        grown, engine.prefixes.used_bytes,
    )  # fmt: skip


def test_one_long_prompt_between_two_steps(tiny_folder):
    """While an answer is written, long prompts come one by one, each after a step; short ones all at once."""
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"base": None}).load()
    order, prefill, step = [], engine._prefill, engine._step

    def noted_prefill(job):
        order.append("long" if job.characters else "short")
        return prefill(job)

    def noted_step(batch):
        if order[-1] != "step":  # of several batches
            order.append("step")
        step(batch)

    engine._prefill, engine._step = noted_prefill, noted_step
    # 300 words are more than 256 tokens; the number makes sure that none is known from the one before
    questions = ["yes"] + [f"{n} " + "cube " * 300 for n in range(3)] + ["no", "refuse"]
    found = [Collected() for _ in questions]
    for question, emit in zip(questions, found, strict=True):
        engine.submit(job(question, emit, max_tokens=8, characters=len(question) if len(question) > 99 else 0))
    engine.close()
    engine.work()  # in this thread, until all is answered
    assert all(emit.events[-1][0] == "end" for emit in found)
    assert order == ["short", *["long", "step"] * 3, "short", "short", "step"]


def test_rows_are_admitted_by_their_bytes(tiny_folder):
    """Three rows of at most P + 20 tokens each, and room for two: the third waits for one to end."""
    from mpi_mlx.models import load_model

    found = [Collected() for _ in range(3)]
    engine = Engine(lambda: load_model(tiny_folder), {"base": None}).load()
    questions = ["yes", "no!", "red"]
    tokens = [len(engine.model.encode([{"role": "user", "content": q}], generation_prompt=True)) for q in questions]
    # 2 layers, keys and values, 2 heads of 8 numbers of 4 bytes
    token_bytes = 2 * 2 * 2 * 8 * 4
    engine._room.limit_bytes = (tokens[0] + tokens[1] + 2 * 20) * token_bytes
    for question, emit in zip(questions, found, strict=True):
        engine.submit(job(question, emit, max_tokens=20, temperature=1.0, seed=1))
    engine._admit()
    assert engine._room.token_bytes == token_bytes and (engine.active, engine.waiting) == (2, 1)
    assert [bool(emit.events) for emit in found] == [True, True, False]
    assert len(engine._waiting[0].encoded) == tokens[2]
    engine._room.limit_bytes = 1  # a row that is alone is taken all the same
    engine.close()
    engine.work()
    assert all(emit.events[-1][0] == "end" for emit in found)
