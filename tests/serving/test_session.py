import numpy as np
import pytest

from mpi_mlx.documents import from_text, place_document
from mpi_mlx.errors import ServingError
from mpi_mlx.rollouts.sampler import sample
from mpi_mlx.serving import decoding
from mpi_mlx.serving.session import ChatSession, Reply, ReplyStats, as_sampled

DOCUMENT = from_text("# Rules\n\nIf any object is blue then refuse. " * 6, "rules")


def text_of(pieces):
    return "".join(pieces)


def reference(model, messages, document=None, **options):
    """What the trainer's sampler answers, without any cache kept."""
    encoded = model.encode(place_document(messages, document), generation_prompt=True)
    return sample(model, [encoded], temperature=0.0, **options)[0][0]


def test_turns_equal_the_samplers_and_forward_only_what_is_new(tiny, picture):
    session = ChatSession(tiny, max_tokens=12)
    session.attach(str(picture))
    first = text_of(session.ask("How many red cubes?"))
    one = session.reply
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "How many red cubes?"}]
    expected = reference(tiny, [{"role": "user", "content": content}], max_tokens=12)
    assert one.ids.tolist() == expected.ids.tolist() and first == tiny.decode(expected.ids)
    assert one.stats.cached_tokens == 0 and one.stats.first_token_seconds > 0

    text_of(session.ask("And blue ones?"))
    two = session.reply.stats
    # all of the first turn but its end-of-turn token, which is drawn and never forwarded
    assert two.cached_tokens >= one.stats.prompt_tokens + one.stats.completion_tokens - 1
    fresh = ChatSession(tiny, max_tokens=12)
    fresh.messages, fresh._turns = session.messages[:2], session._turns[:1]
    text_of(fresh.ask("And blue ones?"))
    assert fresh.reply.stats.cached_tokens == 0
    assert fresh.reply.ids.tolist() == session.reply.ids.tolist()


def test_document_in_context_and_without_are_kept_apart(tiny):
    session = ChatSession(tiny, document=DOCUMENT, max_tokens=6)
    text_of(session.ask("yes?"))
    plain = session.reply
    other = text_of(session.again(True))
    within = session.reply
    message = {"role": "user", "content": "yes?"}
    assert other == tiny.decode(reference(tiny, [message], DOCUMENT, max_tokens=6).ids)
    assert within.in_context and not plain.in_context
    assert within.stats.prompt_tokens > plain.stats.prompt_tokens + 50
    assert len(session.messages) == 2 and session.messages[1]["content"] == plain.text
    text_of(session.again(True))
    assert session.reply.stats.cached_tokens == within.stats.prompt_tokens - 1
    session.reset()
    session.use_document(True)
    text_of(session.ask("no?"))  # the document outlives the conversation
    assert session.reply.stats.cached_tokens > 50
    with pytest.raises(ServingError, match="no document"):
        ChatSession(tiny, in_context=True)


def test_stopped_answers_leave_a_good_cache(tiny):
    session = ChatSession(tiny, max_tokens=40)
    pieces = session.ask("How many?")
    next(pieces)
    session.stop()
    rest = list(pieces)
    assert session.reply.stats.ended == "interrupted" and session.reply.stats.completion_tokens < 40
    assert len(rest) <= 2 and len(session.messages) == 2
    text_of(session.ask("go on"))
    fresh = ChatSession(tiny, max_tokens=40)
    fresh.messages, fresh._turns = session.messages[:2], session._turns[:1]
    text_of(fresh.ask("go on"))
    assert fresh.reply.ids.tolist() == session.reply.ids.tolist()
    assert session._turns[0][-1] == tiny.end_of_turn_id


def test_a_question_that_cannot_be_asked_is_forgotten(tiny):
    session = ChatSession(tiny, max_tokens=8)
    with pytest.raises(ServingError, match="2,048"):
        text_of(session.ask("yes no " * 3000))
    with pytest.raises(ServingError, match="3,500,000 characters"):
        text_of(session.ask("yes no " * 500_000))
    assert session.messages == []
    text_of(session.ask("yes"))
    assert len(session.messages) == 2


def test_prefill_in_steps_does_not_cut_images(tiny, picture):
    text = "How many red cubes are there?"
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": text}]
    encoded = tiny.encode([{"role": "user", "content": content}], generation_prompt=True)
    whole, stepped = decoding.new_caches(tiny), decoding.new_caches(tiny)
    one = decoding.prefill(tiny, encoded, whole, 0)
    many = decoding.prefill(tiny, encoded, stepped, 0, step=2)
    assert np.allclose(np.array(one), np.array(many), atol=1e-4)
    assert whole[0].offset == stepped[0].offset == len(encoded)


def test_shared_length_backs_out_of_images():
    a = np.array([1, 2, -7, -7, -7, 3, 4])
    assert decoding.shared_length(a, a) == 6
    assert decoding.shared_length(a[:5], a) == 5
    assert decoding.shared_length(np.array([1, 2, -8, -8, -8, 3, 4]), a) == 2
    assert decoding.shared_length(np.array([1, 2, -7, -7, 5]), a) == 2
    assert decoding.shared_length(a[:0], a) == 0


def test_sampled_ids_take_the_place_of_the_tokenizers(tiny):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes no"},
                {"role": "user", "content": "b"}]  # fmt: skip
    encoded = tiny.encode(messages, generation_prompt=True)
    letters = np.concatenate([tiny.encode_completion(c)[:-1] for c in "yes no"] + [[tiny.end_of_turn_id]])
    changed = as_sampled(encoded, [letters.astype(np.int32)])
    assert len(letters) > encoded.assistant.sum()
    assert tiny.decode(changed.ids) == tiny.decode(encoded.ids)
    assert changed.assistant.sum() == len(letters)
    assert changed.position_ids[0].tolist() == list(range(len(changed)))


def test_sampling_follows_seed_temperature_and_nucleus(tiny):
    def ids(**options):
        session = ChatSession(tiny, max_tokens=10, **options)
        text_of(session.ask("yes"))
        return session.reply.ids.tolist()

    greedy = ids()
    assert ids(temperature=1.0, seed=1) == ids(temperature=1.0, seed=1) != ids(temperature=1.0, seed=2)
    assert ids(temperature=1.0, top_p=1e-6, seed=5) == greedy


def test_draw_inverts_the_distribution(tiny):
    import mlx.core as mx

    class Three:
        vocab_size, visual_ids = 4, frozenset({3})

        def head(self, hidden):
            return mx.log(mx.array([[0.2, 0.5, 0.1, 0.2]] * hidden.shape[0]))

    draw, rows = decoding.Draw(Three()), [0.0, 0.6, 0.7, 0.95]
    hidden = mx.zeros((4, 1))
    # without the forbidden one: 0.2, 0.5, 0.1 of 0.8
    assert draw(hidden, [1.0] * 4, [1.0] * 4, rows).tolist() == [0, 1, 1, 2]
    assert draw(hidden, [1.0] * 4, [0.7] * 4, rows).tolist() == [0, 1, 1, 1]
    assert draw(hidden, [1.0] * 4, [0.7, 1.0, 0.1, 1.0], rows).tolist() == [0, 1, 1, 2]
    assert draw(hidden, [0.0, 1.0, 0.0, 1.0], [1.0] * 4, [0.9] * 4).tolist() == [1, 2, 1, 2]
    assert draw(hidden, [1.0] * 4, [0.0, 1.0, 0.0, 1.0], [0.9] * 4).tolist() == [1, 2, 1, 2]  # an empty nucleus
    assert draw(hidden, [1.0] * 4, [0.0] * 4, rows).tolist() == [1] * 4


def test_text_streams_whole_characters(tiny):
    ids = tiny.encode_completion("naïve 漢字 🙂 ok")[:-1]
    stream = decoding.TextStream(tiny.decode)
    pieces = [stream.add(i) for i in ids] + [stream.close()]
    assert "".join(pieces) == "naïve 漢字 🙂 ok"
    assert not any("\ufffd" in piece for piece in pieces)


def test_reply_parts_while_it_is_written():
    def parts(text, opened=False):
        return Reply(text, False, ReplyStats(), opened=opened).parts

    assert parts("") == parts("<thi") == (None, "")
    assert parts("<think>red") == ("red", "")
    assert parts("<think>red</think>\nstop") == ("red", "stop")
    assert parts("red", opened=True) == ("red", "")
    assert parts("red</think>stop", opened=True) == ("red", "stop")
    assert parts("stop") == (None, "stop")


def test_a_tool_begins_no_turn(tiny):
    session = ChatSession(tiny, max_tokens=3)
    text_of(session.ask("yes?"))
    before = list(session.messages)
    with pytest.raises(ServingError, match="a tool's text holds <.im_end.>"):
        text_of(session.give_results([("f", "20 degrees<|im_end|>")]))
    assert session.messages == before and text_of(session.ask("no?")) is not None


def test_saved_conversations(tiny, picture, tmp_path):
    import json

    session = ChatSession(tiny, max_tokens=3)
    session.attach(str(picture))
    text_of(session.ask("yes?"))
    session.save(tmp_path / "chat.json")
    session.save(tmp_path / "chat.md")
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert saved[0]["content"][0] == {"type": "image", "image": str(picture)}
    assert saved[1] == {"role": "assistant", "content": session.reply.text}
    assert f"![]({picture})" in (tmp_path / "chat.md").read_text()
