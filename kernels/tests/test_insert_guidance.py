from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from double_kernels import GuidanceBatch, insert_guidance, triton_insert_guidance
from double_kernels.insert_guidance import insert_guidance_reference
from double_kernels.triton_insert_guidance import insert_guidance_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Insert = Callable[..., GuidanceBatch]
INSERTS = [pytest.param(insert_guidance_reference, id="reference"), pytest.param(insert_guidance_triton, id="kernel")]
inserts = pytest.mark.parametrize("insert", INSERTS)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Request:
    """One request of a batch: tokens in the cache, its guidance, the path behind the cached tokens, its pages."""

    num_computed: int
    guidance: list[int]
    path: list[int]
    pages: list[int]


def slow_insert(requests: Sequence[Request], page_size: int, num_tokens: int) -> tuple[list[int], ...]:
    """One token after the other; what GuidanceBatch holds, as lists."""
    batch: tuple[list[int], ...] = ([], [], [], [0], [], [])
    input_ids, positions, slot_mapping, query_start_loc, seq_lens, num_kept = batch
    for request in requests:
        kept = 0
        for token, cached in zip(request.guidance[:-1], request.path, strict=False):
            if token != cached:
                break
            kept += 1
        for index in range(kept, len(request.guidance)):
            position = request.num_computed + index
            input_ids.append(request.guidance[index])
            positions.append(position)
            slot_mapping.append(request.pages[position // page_size] * page_size + position % page_size)
        query_start_loc.append(len(input_ids))
        seq_lens.append(request.num_computed + len(request.guidance))
        num_kept.append(kept)
    room = num_tokens - len(input_ids)
    for values, padding in ((input_ids, 0), (positions, 0), (slot_mapping, -1)):
        values.extend([padding] * room)
    return batch


def flat(lists: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, and int32 [len(lists) + 1] where each list begins and the last ends."""
    starts = [0]
    for tokens in lists:
        starts.append(starts[-1] + len(tokens))
    tokens = torch.tensor([token for some in lists for token in some], dtype=dtype, device=DEVICE)
    return tokens, torch.tensor(starts, dtype=torch.int32, device=DEVICE)


def arguments(requests: Sequence[Request], room: int = 0, dtype: torch.dtype = torch.int64) -> list[torch.Tensor]:
    """guidance, guidance_start_loc, num_computed_tokens, block_table (with garbage behind what is read)."""
    guidance, starts = flat([r.guidance for r in requests], dtype)
    if room:
        guidance = torch.cat([guidance, torch.full((room,), 99, dtype=dtype, device=DEVICE)])
    width = max((len(r.pages) for r in requests), default=0) + 2
    table = torch.tensor([r.pages + [-12345] * (width - len(r.pages)) for r in requests], dtype=torch.int32)
    computed = torch.tensor([r.num_computed for r in requests], dtype=torch.int32, device=DEVICE)
    # A row of a larger table, as a runner has it: the stride is not the width.
    backing = torch.full((len(requests), width + 3), -777, dtype=torch.int32)
    backing[:, :width] = table.view(len(requests), width)
    return [guidance, starts, computed, backing.to(DEVICE)[:, :width]]


def check(
    insert: Insert, requests: Sequence[Request], page_size: int, room: int = 0, dtype: torch.dtype = torch.int64
) -> GuidanceBatch:
    given = arguments(requests, room, dtype)
    before = [tensor.clone() for tensor in given]
    paths: dict[str, torch.Tensor] = {}
    if any(r.path for r in requests):
        path, path_start_loc = flat([r.path for r in requests], torch.int32)
        paths = {"path": path, "path_start_loc": path_start_loc}
    batch = insert(*given, page_size=page_size, **paths)
    expected = slow_insert(requests, page_size, len(given[0]))
    assert [values.tolist() for values in batch] == list(expected)
    assert [values.dtype for values in batch] == [torch.int64] * 3 + [torch.int32] * 3
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))
    return batch


def ragged(
    num_requests: int, longest: int, page_size: int, *, with_paths: bool, seed: int = 0, longest_text: int = 90
) -> list[Request]:
    """Random requests; guidance follows its path for a while, is shorter or longer than it, or is empty."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        num_computed = rng.randrange(longest_text)
        guidance = [rng.randrange(50) for _ in range(rng.randint(0, longest))]
        path: list[int] = []
        if with_paths and rng.random() < 0.8:
            path = guidance[: rng.randint(0, len(guidance))] + [rng.randrange(50) for _ in range(rng.randint(0, 5))]
        num_pages = -(-(num_computed + len(guidance)) // page_size)
        requests.append(Request(num_computed, guidance, path, [rng.randrange(1000) for _ in range(num_pages)]))
    return requests


@inserts
@pytest.mark.parametrize("with_paths", [False, True], ids=["nothing-cached", "paths"])
@pytest.mark.parametrize(
    ("num_requests", "longest", "page_size"),
    [
        pytest.param(requests, longest, page_size, id=f"R{requests}-T{longest}-S{page_size}")
        for requests, longest, page_size in [(1, 1, 1), (1, 130, 16), (7, 5, 3), (16, 17, 32), (33, 63, 8), (5, 300, 128)]
    ],
)
def test_layout_is_that_of_one_token_after_the_other(
    num_requests: int, longest: int, page_size: int, with_paths: bool, insert: Insert
) -> None:
    for seed in range(3):
        check(insert, ragged(num_requests, longest, page_size, with_paths=with_paths, seed=seed), page_size)


@inserts
def test_many_requests_with_long_chains_are_kept_apart(insert: Insert, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that the kernel sums their counts in several steps."""
    num_requests = 1024 if DEVICE == "cuda" else 150  # the interpreter is slow
    monkeypatch.setattr(triton_insert_guidance, "_REQUESTS", 64)
    check(insert, ragged(num_requests, 128, 16, with_paths=True, longest_text=2000), 16)


@inserts
@pytest.mark.parametrize("num_requests", [1, 2, 5])
@pytest.mark.parametrize("with_paths", [False, True], ids=["nothing-cached", "paths"])
def test_tokens_behind_the_guidance_are_padding(num_requests: int, with_paths: bool, insert: Insert) -> None:
    check(insert, ragged(num_requests, 40, 4, with_paths=with_paths, seed=4), 4, room=700)


@inserts
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_dtype_of_the_tokens_does_not_matter(dtype: torch.dtype, insert: Insert) -> None:
    check(insert, ragged(9, 20, 8, with_paths=True, seed=5), 8, dtype=dtype)


@inserts
def test_last_guidance_token_is_computed_in_any_case(insert: Insert) -> None:
    requests = [
        Request(6, [1, 2, 3], [1, 2, 3], [5, 6, 7]),
        Request(0, [4], [4, 4, 4], [8]),
        Request(3, [7, 7, 7], [7, 7, 7, 7, 7], [1, 2]),
        Request(3, [], [7, 7], [1]),
    ]
    batch = check(insert, requests, 4)
    assert batch.num_kept.tolist() == [2, 0, 2, 0]
    assert batch.query_start_loc.diff().tolist() == [1, 1, 1, 0]


@inserts
def test_tokens_that_agree_behind_a_difference_are_computed(insert: Insert) -> None:
    batch = check(insert, [Request(2, [1, 2, 9, 4, 5], [1, 2, 3, 4, 5], [3, 1])], 4)
    assert batch.num_kept.tolist() == [2]


@inserts
def test_differences_are_found_in_every_block(insert: Insert) -> None:
    path = list(range(300))
    requests = [
        Request(1, [*path[:place], 999, *path[place + 1 :]], path, list(range(40)))
        for place in (0, 127, 128, 129, 255, 256, 299)
    ]
    assert check(insert, requests, 8).num_kept.tolist() == [0, 127, 128, 129, 255, 256, 299]


@inserts
def test_slots_are_wider_than_int32(insert: Insert) -> None:
    last = (1 << 31) - 1
    batch = check(insert, [Request(130, [1, 2], [], [0, last]), Request(127, [3, 4], [3], [last, last - 1])], 128)
    assert int(batch.slot_mapping.max()) == last * 128 + 3


@inserts
def test_no_requests_give_padding_alone(insert: Insert) -> None:
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    table = torch.zeros((0, 4), dtype=torch.int32, device=DEVICE)
    guidance = torch.full((3,), 7, device=DEVICE)
    batch = insert(guidance, torch.zeros(1, dtype=torch.int32, device=DEVICE), empty, table, page_size=4)
    assert [values.tolist() for values in batch] == [[0] * 3, [0] * 3, [-1] * 3, [0], [], []]


@inserts
@pytest.mark.parametrize("with_paths", [False, True], ids=["nothing-cached", "paths"])
def test_requests_without_guidance_get_no_tokens(with_paths: bool, insert: Insert) -> None:
    check(insert, [Request(4, [], [1] * with_paths, [1]), Request(0, [], [], [])], 4)


GOOD = ragged(3, 6, 4, with_paths=False, seed=1)


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        pytest.param(0, lambda t: t.float(), id="floats"),
        pytest.param(0, lambda t: t.view(1, -1), id="two-dimensions"),
        pytest.param(1, lambda t: t.long(), id="long-starts"),
        pytest.param(1, lambda t: t[1:], id="starts-without-the-first"),
        pytest.param(2, lambda t: t[1:], id="requests-of-another-number"),
        pytest.param(3, lambda t: t.long(), id="long-pages"),
        pytest.param(3, lambda t: t[:, ::2], id="strided-pages"),
        pytest.param(3, lambda t: t[1:], id="rows-missing"),
    ],
)
def test_wrong_arguments_are_refused(index: int, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = arguments(GOOD)
    given[index] = wrong(given[index])
    with pytest.raises(ValueError, match="must be"):
        insert_guidance(*given, page_size=4)


def test_half_a_path_is_refused() -> None:
    given = arguments(GOOD)
    with pytest.raises(ValueError, match="come together"):
        insert_guidance(*given, page_size=4, path=given[0])
    with pytest.raises(ValueError, match="page_size"):
        insert_guidance(*given, page_size=0)


def test_the_checked_op_lays_out_the_same() -> None:
    check(insert_guidance, GOOD, 4)
    check(insert_guidance, ragged(9, 12, 4, with_paths=True, seed=2), 4)
