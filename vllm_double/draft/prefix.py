"""Which pages of a request's text are in the prefix cache, or go there."""

from vllm_double.draft.arena import Arena
from vllm_double.draft.page_pool import PagePool, page_key, partition_key

__all__ = ["Prefix"]


class Prefix:
    """Keys of the text's full pages, as far as they were asked for, from ``partition_key`` on."""

    def __init__(self, pool: PagePool, page_size: int, tenant: str | None, epoch: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._keys = [partition_key(tenant, epoch)]

    def rewind(self, length: int) -> None:
        """The text keeps so many tokens, and others follow."""
        del self._keys[length // self._page_size + 1 :]

    def known_pages(self, arena: Arena, slot: int) -> list[int]:
        """The longest run of pages that the cache has for the text at admission, from where the cached text ends.

        At least its last token is left to be read.
        """
        request, size, pages = arena.requests[slot], self._page_size, []
        for index in range(request["num_cached"] // size, (min(request["length"], request["num_admitted"]) - 1) // size):
            page = self._pool.lookup(self._key(arena, slot, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, arena: Arena, slot: int) -> None:
        """Put full pages of cached text into the cache. No forward that writes them may be under way."""
        request = arena.requests[slot]
        while (request["num_inserted"] + 1) * self._page_size <= request["num_cached"]:
            index = int(request["num_inserted"])
            self._pool.insert(self._key(arena, slot, index), int(arena.trunks[slot, index]))
            request["num_inserted"] = index + 1

    def _key(self, arena: Arena, slot: int, index: int) -> bytes:
        size, keys = self._page_size, self._keys
        while len(keys) <= index + 1:
            end = len(keys) * size
            keys.append(page_key(keys[-1], arena.texts[slot, end - size : end].tolist()))
        return keys[index + 1]
