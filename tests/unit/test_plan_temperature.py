"""The scripted pair at a temperature above 0: sampled with shared noise by this loop, by probability ratios by the others."""

from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chisquare

from tests.fakes.target import FreeVerification
from vllm_double.cli import main
from vllm_double.draft.engine.base import Batch, Row
from vllm_double.planning.predict import METHODS, Deployment, predict
from vllm_double.planning.published import speculative
from vllm_double.planning.script import NUM_LISTED, Script, Tables, Text, Times, texts
from vllm_double.planning.world import ScriptedEngine, ScriptedRetriever, SimulatedClock, simulate

TYPICAL = [
    Script(acceptance, tail=tail, temperature=temperature)
    for acceptance, tail in ((0.4, 0.5), (0.65, 0.5), (0.65, 1.0), (0.8, 0.3))
    for temperature in (0.5, 0.7, 1.0)
]


def name_of(script: Script) -> str:
    return f"a{script.acceptance:g}-tail{script.tail:g}-T{script.temperature:g}"


def many_tokens(count: int) -> npt.NDArray[np.uint64]:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(99991)


@pytest.mark.parametrize(
    ("script", "sums"),
    [
        (Script(0.65, copied=0.3), [3234187917, 1254632090]),
        (Script(0.8, tail=1.0, seed=7), [10345278, 4132727632]),
    ],
)
def test_greedy_texts_are_those_of_earlier_versions(script: Script, sums: list[int]) -> None:
    found = [(text.tokens.tolist(), text.ranks, text.copied, text.agreed) for text in texts(Tables(script), 2, 500)]
    assert [crc32(repr(text).encode()) for text in found] == sums


# ---- the pair -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_target_draws_from_its_softmax(temperature: float) -> None:
    tables = Tables(Script(0.5, temperature=temperature))
    for token in (5, 6, 7):
        listed, _, log_probs = tables.log_probs(np.array([token], np.uint64))
        expected = 20_000 * np.exp(log_probs[0])
        for seeds, positions in ((17, np.arange(20_000)), (np.arange(20_000), 17)):
            drawn = tables.targets(np.full(20_000, token, np.int32), seeds, positions)
            counts = (listed[0][:, None] == drawn).sum(axis=1)
            is_rare = expected < 10
            groups = [
                np.append(numbers[~is_rare], numbers[is_rare].sum() + 1e-9)  # the rare ones together; there may be none
                for numbers in (counts, expected)
            ]
            assert counts.sum() == 20_000
            assert chisquare(*groups, sum_check=False).pvalue > 1e-4


def test_the_targets_likeliest_token_is_drawn_from_the_drafts_distribution() -> None:
    """At every temperature it is the same token, and as often the draft's first as in a greedy script."""
    tokens = many_tokens(20_000)
    likeliest = [
        Tables(Script(0.65, temperature=temperature)).log_probs(tokens)[2].argmax(axis=1) for temperature in (0.2, 1.0, 3.0)
    ]
    assert (likeliest[0] == likeliest[1]).all() and (likeliest[1] == likeliest[2]).all()
    probs = np.exp(Tables(Script(0.65, temperature=1.0)).log_probs(tokens)[1])
    for place in (0, 1, 5):
        assert (likeliest[1] == place).mean() == pytest.approx(probs[:, place].mean(), abs=0.01)


def test_temperatures_scale_the_logits() -> None:
    tokens = many_tokens(100)
    _, *cold = Tables(Script(0.65, temperature=0.5)).log_probs(tokens)
    _, *hot = Tables(Script(0.65, temperature=1.0)).log_probs(tokens)
    for at_half, at_one in zip(cold, hot, strict=True):
        assert np.exp(at_half).sum(axis=1) == pytest.approx(1.0)
        assert at_half - at_half[:, :1] == pytest.approx(2 * (at_one - at_one[:, :1]), abs=1e-6)


def test_the_drafts_list_is_ranked_by_log_probability_plus_noise() -> None:
    """Its probabilities are those without the noise, and a seed and a position for each token is the same as one for all."""
    tables = Tables(Script(0.65, temperature=0.7))
    tokens = many_tokens(200)
    listed, log_probs, _ = tables.log_probs(tokens)
    positions = np.arange(200) % 7
    every, probs = tables.children(tokens, NUM_LISTED, 3, positions)
    few, few_probs = tables.children(tokens, 5, np.full(200, 3), positions)
    assert (few == every[:, :5]).all() and (few_probs == probs[:, :5]).all()
    assert all(len(set(line)) == NUM_LISTED for line in every.tolist())
    places = (every[:, :, None] == listed[:, None, :]).argmax(axis=2)
    assert probs == pytest.approx(np.take_along_axis(np.exp(log_probs), places, 1), rel=1e-5)
    assert (np.diff(probs, axis=1) > 0).any()
    # The noise is what a text is drawn with: a target with the draft's probabilities would draw the first of each list.
    first = np.bincount((every[:, :1] == listed).argmax(axis=1), minlength=NUM_LISTED)
    assert first[0] / 200 == pytest.approx(np.exp(log_probs[:, 0]).mean(), abs=0.1)


@pytest.mark.parametrize("script", TYPICAL, ids=name_of)
def test_shared_noise_accepts_more_than_the_favourite_and_less_than_the_optimum(script: Script) -> None:
    """What two argmaxes with the same noise agree on has a closed form; the lists and the texts agree as often."""
    tables, tokens, positions = Tables(script), many_tokens(1000), np.arange(1000)
    draft, target = (np.exp(log_probs) + 1e-30 for log_probs in tables.log_probs(tokens)[1:])
    ratios = np.maximum(draft[:, None, :] / draft[:, :, None], target[:, None, :] / target[:, :, None])
    expected = (1 / ratios.sum(axis=2)).sum(axis=1)
    optimum = np.minimum(draft, target).sum(axis=1)
    assert target[:, 0].mean() + 0.001 < expected.mean() < optimum.mean() - 0.001
    assert (expected >= optimum / (2 - optimum) - 1e-9).all(), "(1 - TV) / (1 + TV): Daliri et al., 2408.07978"
    is_shared = [
        tables.children(tokens, 1, seed, positions)[0][:, 0] == tables.targets(tokens.astype(np.int32), seed, positions)
        for seed in range(10)
    ]
    assert np.mean(is_shared) == pytest.approx(expected.mean(), abs=0.015)


def test_more_outcomes_are_covered_if_the_list_knows_the_noise() -> None:
    tables = Tables(Script(0.65, temperature=1.0))
    [text] = texts(tables, 1, 2000)
    ranked, _ = tables.children(text.tokens[:-1].astype(np.uint64), NUM_LISTED, text.seed, np.arange(1999))
    by_noise = (ranked == text.tokens[1:, None]).argmax(axis=1)
    by_chance = np.array(text.ranks[1:])
    for count in (2, 4, 8, 16):
        assert (by_noise < count).mean() > (by_chance < count).mean() + 0.03


# ---- texts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_text_is_drawn_at_the_positions_before_its_tokens(temperature: float) -> None:
    tables = Tables(Script(0.6, copied=0.3, temperature=temperature))
    for text in texts(tables, 2, 200):
        assert text.seed == tables.seed(int(text.tokens[0]))
        for place in range(1, 200):
            before = int(text.tokens[place - 1])
            assert text.tokens[place] == tables.target(before, text.seed, place - 1)
            listed = tables.log_probs(np.array([before], np.uint64))[0][0]
            assert listed[text.ranks[place]] == text.tokens[place]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_coins_accept_as_often_as_the_distributions_overlap(temperature: float) -> None:
    """And behind a rejection, the target's token is one that the target gives more than the draft does."""
    tables = Tables(Script(0.65, temperature=temperature))
    found, expected = [], []
    for text in texts(tables, 10, 2000):
        _, *log_probs = tables.log_probs(text.tokens[:-1].astype(np.uint64))
        accepted, ranks = np.array(text.accepted[1:]), np.array(text.ranks[1:])
        draft, target = (values[np.arange(1999), ranks] for values in log_probs)
        assert (target > draft)[~accepted].all()
        found.append(accepted.mean())
        expected.append(np.exp(np.minimum(*log_probs)).sum(axis=1).mean())
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.01)


def test_speculative_decoding_gives_the_tokens_of_the_closed_form() -> None:
    """Leviathan et al., 2211.17192, equation 1, with the share of heads as the acceptance."""
    scripted = texts(Tables(Script(0.65, temperature=1.0)), 8, 2756)
    acceptance = np.mean([text.accepted for text in scripted])
    for draft_length in (1, 4):
        play = speculative(scripted, Times(10.0, 1.0), 2500, draft_length)
        expected = (1 - acceptance ** (draft_length + 1)) / (1 - acceptance)
        assert 8 * 2499 / play.forwards == pytest.approx(expected, rel=0.03)


# ---- the world --------------------------------------------------------------------------------------------------------------


def test_the_engine_answers_with_the_noise_of_each_text_and_position() -> None:
    tables = Tables(Script(0.65, temperature=1.0))
    first, second = texts(tables, 2, 200)
    engine = ScriptedEngine(tables, Times(1.0, 1.0), SimulatedClock(), 1000, num_pages=16)

    def answer(*rows: Row) -> list[list[int]]:
        return engine.forward(Batch.of(rows), 4)[0].tolist()

    def expected(text: Text, places: range) -> list[list[int]]:
        tokens = text.tokens[list(places)].astype(np.uint64)
        return tables.children(tokens, 4, text.seed, np.array(places))[0].tolist()

    whole = [Row(pages, 0, text.tokens[:60].tolist(), 3, 1.0, text.seed) for pages, text in (([5], first), ([2], second))]
    assert answer(*whole) == expected(first, range(57, 60)) + expected(second, range(57, 60))
    ahead = [
        Row([8, 9], 60, second.tokens[60:70].tolist(), 10, 1.0, second.seed),
        Row([7], 60, first.tokens[60:62].tolist(), 1, 1.0, first.seed),
        Row([5], 60, first.tokens[60:61].tolist(), 0, 1.0, first.seed),
        Row([2], 60, second.tokens[60:61].tolist(), 1, 1.0, second.seed),
    ]
    assert answer(*ahead) == expected(second, range(60, 70)) + expected(first, range(61, 62)) + expected(second, range(60, 61))


def rounds_on_one_path(tables: Tables, prompt: int, num_tokens: int, draft_length: int) -> int:
    """PEARL (2408.11850) with shared noise, slow and obvious: the draft's first token is the one that it would draw."""
    seed, text, num_rounds = tables.seed(prompt), [prompt], 0
    to_verify: list[int] = []
    while len(text) < num_tokens:
        num_rounds += 1
        drafted = [*text, *to_verify]
        for _ in range(draft_length):
            last = np.array([drafted[-1]], np.uint64)
            drafted.append(int(tables.children(last, 1, seed, len(drafted) - 1)[0][0, 0]))
        new = drafted[-draft_length:]
        for token in [*to_verify, None]:
            text.append(tables.target(text[-1], seed, len(text) - 1))
            if text[-1] != token:
                break
        to_verify = new[1:] if token is None and text[-1] == new[0] else []
    return num_rounds


@pytest.mark.parametrize("draft_length", [2, 4])
@pytest.mark.parametrize("script", [Script(0.65, temperature=1.0), Script(0.8, temperature=0.7, seed=3)], ids=name_of)
def test_the_loop_on_one_path_takes_the_rounds_of_pearl_with_shared_noise(script: Script, draft_length: int) -> None:
    expected = [rounds_on_one_path(Tables(script), prompt, 120, draft_length) for prompt in (7919, 15838)]
    found = simulate(
        script, Times(1e-3 * (2 * draft_length + 1.5), 1e-3), num_tokens=120, batch=2, num_speculative_tokens=draft_length - 1,
        nodes_per_iteration=1, children_per_node=1, min_path_prob=1e-120, step_cost=FreeVerification(), may_wait=False,
    )  # fmt: skip
    assert (found.forwards, found.rounds) == (sum(expected), max(expected))


def test_retrieval_knows_the_draws_of_a_copied_run() -> None:
    tables = Tables(Script(0.5, copied=0.5, copy_length=6.0, temperature=1.0))
    [text] = texts(tables, 1, 300)
    assert np.mean(np.array(text.copied) > 0) == pytest.approx(0.5, abs=0.1)
    for place in range(1, 250):
        for start in (1, max(1, place - 3), place):  # the same from the text's end and through a tail
            retriever = ScriptedRetriever(tables)
            retriever.start(1, text.tokens[: min(2, start)], None)
            retriever.extend(1, text.tokens[min(2, start) : start].tolist())
            found = retriever.lookup(1, text.tokens[start:place].tolist(), 10)
            known = text.copied[place]
            assert (found is None) == (known == 0)
            if found is not None:
                right = min(known, 10)
                assert found.tokens[:right] == text.tokens[place : place + right].tolist()
                assert known >= 10 or found.tokens[right] != text.tokens[place + right]


# ---- the command ------------------------------------------------------------------------------------------------------------


def test_the_table_shows_its_temperature(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cost-ratio", "8", "--acceptance", "0.65", "--tokens", "60"]
    assert main(["plan", *options, "--temperature", "0.7"]) == 0
    heading, _, _, row = capsys.readouterr().out.splitlines()
    assert "temperature 0.7" in heading
    found = predict(Script(0.65, temperature=0.7), Deployment(8.0, 1, 0.03, 0.05, 1.0), 60)
    assert row.split()[2:7] == [f"{found.speedups[method]:.2f}" for method in METHODS]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *options, "--temperature", "11"])
    assert "--temperature: 11 is not from 0 to 10" in capsys.readouterr().err


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="the temperature is -1"):
        Script(0.5, temperature=-1.0)
