"""Everything between commit and cut in one compiled call, for sources of one bundle.

Imports torch with `double_kernels`: import this module when a proposer is made.
"""

from typing import Any

from double_kernels.ranking import row_chances

from vllm_double.jit import view_part
from vllm_double.retrieval.base import Queries
from vllm_double.retrieval.bundle import look_up
from vllm_double.target import _choose_steps as steps
from vllm_double.target._trie_steps import NONE

_ask, _find, _extend = view_part(steps.ask), view_part(steps.find_paths), view_part(steps.extend_paths)


@view_part
def _know_noise(tries: Any, queries: Any, found: Any) -> None:
    """As `known_noise.know_noise`."""
    for row in range(len(queries.keys)):
        request = tries.requests[queries.keys[row]]
        position = request.length + queries.tail_lengths[row] - 1
        for source in range(len(found.lengths) if request.temperature > 0 else 0):
            row_chances(
                request.seed, position, found.tokens[source, row], found.lengths[source, row], found.beliefs[source, row]
            )


def find_whole_paths(tries: Any, tables: Any, search: Any, rows: Any, live: Any, picked: Any, floor: float, found: Any,
                     sources: Any, indexes: Any) -> int:  # fmt: skip
    """See `_choose_steps`. Returns the row of a request that the sources do not know, or NONE."""
    num = len(picked)
    _ask(live, picked)
    queries = Queries(live.keys[:num], live.tails, live.tail_lengths, live.tail_limits)
    unknown = look_up(indexes, queries, found)
    if unknown == NONE:
        _know_noise(tries, queries, found)
        _find(tries, tables, search, rows, live, picked, floor, found, sources)
        unknown = look_up(indexes, queries, found)
    if unknown == NONE:
        _know_noise(tries, queries, found)
        _extend(tries, tables, search, rows, live, picked, floor, found, sources)
    return unknown  # type: ignore[no-any-return]
