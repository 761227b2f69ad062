"""What a user did to Gaussians in an editor, as text that a workflow can carry.

It is a state, not a list of operations: where changed Gaussians lie now, which are gone, and which were added. So the
text does not grow with the time spent editing.

Edits name tokens by index, which means nothing for another layout. So they carry a fingerprint of the layout that they
were made on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from gpstoken_diffusers.geometry import GEOMETRY_CHANNELS, RHO, SIGMA, bounded
from gpstoken_diffusers.token_editing import deleted_tokens, exchange_tokens
from gpstoken_diffusers.tokens import GPSTokens

VERSION = 2
_VERSION_WITHOUT_FINGERPRINT = 1

# In canvas coordinates, in which the picture spans 2: far beyond what an editor makes, well within float32.
_LARGEST = 100.0
_KEYS = ("version", "num_tokens", "changed", "deleted", "added")

# Two layouts whose geometry differs by at most this root mean square count as the same. Computing in bfloat16 instead
# of float32 makes 2e-4. A change of a few pixels that reorders the partition makes 0.05 or more, another picture 0.4
# (all measured with gpstoken-mini, 16 to 256 tokens).
_SAME_LAYOUT = 0.01
_FINGERPRINT_UNIT = 1e-4  # so that a fingerprint is short integers, which pass through JSON and the page unchanged
_FINGERPRINT_NUMBERS = 8

_ADVICE = "Press Reset in the editor."

Geometry = tuple[float, float, float, float, float]
"""(sigma_x, sigma_y, rho, x, y) in the canvas coordinates of GPSTokens."""

Fingerprint = tuple[int, ...]
"""What [`layout_fingerprint`] gives."""


def layout_fingerprint(tokens: GPSTokens) -> Fingerprint:
    """Eight integers that tell the layout of one picture from others; textures do not count.

    Each is a sum of all numbers of the geometry with signs that are random, but always the same, over the square root
    of how many they are, in units of 1e-4. The mean square difference of two fingerprints then estimates that of the
    geometries, so that they can be compared with a tolerance. A hash could not: of some hundred rounded numbers, one
    lies so near to a rounding border that the noise of another machine's arithmetic changes it.

    Raises ValueError: several pictures.
    """
    if tokens.batch_size != 1:
        raise ValueError(f"A fingerprint is of one picture, these are {tokens.batch_size}: index the tokens first.")
    numbers = tokens.geometry[0].detach().to("cpu", torch.float64).flatten()
    # Bit k of byte i is the sign of number i in sum k. Torch's generator may give other numbers in other versions.
    noise = hashlib.shake_256(b"gpstoken layout").digest(len(numbers))
    bits = torch.frombuffer(bytearray(noise), dtype=torch.uint8)[:, None] >> torch.arange(_FINGERPRINT_NUMBERS) & 1
    sums = (1.0 - 2.0 * bits.double()).T @ numbers / len(numbers) ** 0.5
    return tuple(round(value / _FINGERPRINT_UNIT) for value in sums.tolist())


@dataclass(frozen=True)
class AddedToken:
    """A Gaussian that the editor added: it shows what the token `source` showed before all edits."""

    source: int
    geometry: Geometry


@dataclass(frozen=True)
class LayoutEdits:
    """Changes to the Gaussians of one picture; `LayoutEdits()` is none.

    As text: {"version": 2, "num_tokens": N, "fingerprint": [8 integers] or null,
    "changed": {"index": [sigma_x, sigma_y, rho, x, y], ...}, "deleted": [index, ...],
    "added": [{"from": index, "geometry": [sigma_x, sigma_y, rho, x, y]}, ...]}. Text of version 1 has no fingerprint.

    Attributes:
        num_tokens: how many tokens the picture has that was edited; all indices count those, from 0.
        changed: index -> where that token lies now.
        deleted: indices of tokens that are gone; none of them is in `changed`.
        added: new tokens in their order; the source of one may be deleted or changed.
        fingerprint: [`layout_fingerprint`] of the layout that was edited; None takes any with as many tokens.
    """

    num_tokens: int = 0
    changed: Mapping[int, Geometry] = field(default_factory=dict)
    deleted: tuple[int, ...] = ()
    added: tuple[AddedToken, ...] = ()
    fingerprint: Fingerprint | None = None

    @property
    def is_empty(self) -> bool:
        """Whether these edits change nothing."""
        return not (self.changed or self.deleted or self.added)

    @classmethod
    def parse(cls, text: str) -> LayoutEdits:
        """Reads what `to_json` or the editor wrote; empty text is no edits.

        Raises ValueError: not such text. The message says where it is wrong and what to do.
        """
        if not text.strip():
            return cls()
        try:
            state = json.loads(text, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            _refuse(f"they are not JSON: {error}")
        if not isinstance(state, dict):
            _refuse(f"they are not a JSON object but {_shown(state)}")
        version = state.get("version", VERSION)
        if type(version) is not int or version not in (_VERSION_WITHOUT_FINGERPRINT, VERSION):
            raise ValueError(
                f"The edits are of version {_shown(version)}, this package knows those up to {VERSION}: update "
                "gpstoken_diffusers, or press Reset in the editor."
            )
        _check_keys(state, _KEYS if version == _VERSION_WITHOUT_FINGERPRINT else (*_KEYS, "fingerprint"), "they")
        num_tokens = state["num_tokens"]
        if type(num_tokens) is not int or num_tokens < 1:
            _refuse(f"num_tokens must be an integer of at least 1, not {_shown(num_tokens)}")
        for name, kind in (("changed", dict), ("deleted", list), ("added", list)):
            if not isinstance(state[name], kind):
                _refuse(f"{name} must be {'an object' if kind is dict else 'a list'}, not {_shown(state[name])}")
        changed = {
            _index_of_key(key, num_tokens): _geometry(value, f"token {key}") for key, value in state["changed"].items()
        }
        deleted = tuple(_index(value, num_tokens, "deleted") for value in state["deleted"])
        if len(set(deleted)) < len(deleted):
            _refuse("deleted names a token twice")
        if both := sorted(changed.keys() & set(deleted)):
            _refuse(f"token {both[0]} is both changed and deleted")
        added = tuple(_added(value, place, num_tokens) for place, value in enumerate(state["added"]))
        return cls(num_tokens, changed, deleted, added, _fingerprint(state.get("fingerprint")))

    def to_json(self) -> str:
        """Compact text for `parse`; empty if nothing is edited."""
        if self.is_empty:
            return ""
        state = {
            "version": VERSION,
            "num_tokens": self.num_tokens,
            "fingerprint": None if self.fingerprint is None else list(self.fingerprint),
            "changed": {str(index): list(geometry) for index, geometry in self.changed.items()},
            "deleted": list(self.deleted),
            "added": [{"from": token.source, "geometry": list(token.geometry)} for token in self.added],
        }
        return json.dumps(state, separators=(",", ":"))

    def is_foreign_to(self, tokens: GPSTokens) -> bool:
        """Whether they were made on another layout, which has as many tokens as this picture by chance.

        False if they change nothing or have no fingerprint, and for pictures that `apply` refuses anyway (several, or
        another number of tokens).
        """
        if self.is_empty or self.fingerprint is None or (tokens.batch_size, tokens.num_tokens) != (1, self.num_tokens):
            return False
        pairs = zip(self.fingerprint, layout_fingerprint(tokens), strict=True)
        # Integers all along: what text says may be too large for a float.
        largest = round(_SAME_LAYOUT / _FINGERPRINT_UNIT) ** 2
        return sum((one - other) ** 2 for one, other in pairs) > _FINGERPRINT_NUMBERS * largest

    def apply(self, tokens: GPSTokens) -> GPSTokens:
        """The edited picture.

        Args:
            tokens: one picture, or a layout; any batch if there are no edits.

        Returns: the given tokens if there are no edits. Else new ones: those that were there, in their order, then
            added ones, tile by tile; an added token belongs to the tile of its source. Deleted tokens are taken out,
            but for what tiles need to hold equally many. sigma >= 1e-5 and |rho| <= 1 - 1e-6 where they are edited.

        Raises ValueError: several pictures, another number of tokens than that edited, another layout
            (`dataclasses.replace(edits, fingerprint=None)` applies edits anyway), edits of tokens that were
            deleted before, or edits that leave no token.
        """
        if self.is_empty:
            return tokens
        if tokens.batch_size != 1:
            raise ValueError(
                f"These are {tokens.batch_size} pictures, but edits belong to one: give the editor a single picture, "
                "or press Reset in the editor."
            )
        if tokens.num_tokens != self.num_tokens:
            raise ValueError(
                f"The edits were made for {self.num_tokens} tokens, these are {tokens.num_tokens}: press Reset in the "
                "editor."
            )
        if self.is_foreign_to(tokens):
            raise ValueError(
                "The edits were made on another layout, of another picture or seed: bring that one back, or press "
                "Apply anyway or Reset in the editor."
            )
        gone = set(deleted_tokens(tokens)[0].nonzero().flatten().tolist())
        if dead := sorted(gone & {*self.changed, *self.deleted, *(token.source for token in self.added)}):
            raise ValueError(
                f"The edits name token {dead[0]}, which had been deleted before: press Reset in the editor."
            )
        if not self.added and len(gone) + len(self.deleted) == self.num_tokens:
            raise ValueError("The edits delete every token: undo in the editor, or press Reset.")
        edited = tokens
        if self.changed:
            geometry = tokens.geometry.clone()
            geometry[0, list(self.changed)] = bounded(geometry.new_tensor(list(self.changed.values())))
            edited = replace(edited, geometry=geometry)
        if self.deleted or self.added:
            away = torch.zeros(self.num_tokens, dtype=torch.bool)
            away[list(self.deleted)] = True
            places = torch.tensor([token.geometry for token in self.added]).reshape(-1, GEOMETRY_CHANNELS)
            edited = exchange_tokens(edited, away, [token.source for token in self.added], places)
        return edited


# Reading


def _refuse(problem: str) -> NoReturn:
    raise ValueError(f"The edits are damaged: {problem}. {_ADVICE}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads would silently keep the last of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _check_keys(value: dict[str, Any], expected: tuple[str, ...], owner: str) -> None:
    if missing := [key for key in expected if key not in value]:
        _refuse(f"{owner} lack {missing[0]}" if owner == "they" else f"{owner} lacks {missing[0]}")
    if unknown := sorted(value.keys() - set(expected)):
        verb = "have" if owner == "they" else "has"
        _refuse(f"{owner} {verb} an unknown key {_shown(unknown[0])}")


def _index(value: Any, num_tokens: int, name: str) -> int:
    if type(value) is not int or not 0 <= value < num_tokens:
        _refuse(f"{name} must hold integers from 0 to {num_tokens - 1}, not {_shown(value)}")
    return value


def _index_of_key(key: str, num_tokens: int) -> int:
    # Only as an integer is written in JSON: "007" and "7" would be one token.
    if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
        _refuse(f"keys of changed must be integers, not {_shown(key)}")
    return _index(int(key), num_tokens, "keys of changed")


def _added(value: Any, place: int, num_tokens: int) -> AddedToken:
    owner = f"added token {place}"
    if not isinstance(value, dict):
        _refuse(f"{owner} must be an object, not {_shown(value)}")
    _check_keys(value, ("from", "geometry"), owner)
    return AddedToken(_index(value["from"], num_tokens, f"from of {owner}"), _geometry(value["geometry"], owner))


def _fingerprint(value: Any) -> Fingerprint | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != _FINGERPRINT_NUMBERS
        or any(type(number) is not int for number in value)
    ):
        _refuse(f"fingerprint must be {_FINGERPRINT_NUMBERS} integers or null, not {_shown(value)}")
    return tuple(value)


def _geometry(value: Any, owner: str) -> Geometry:
    if not isinstance(value, list) or len(value) != GEOMETRY_CHANNELS:
        _refuse(f"the geometry of {owner} must be five numbers, not {_shown(value)}")
    for number in value:
        # NaN compares as false.
        if type(number) not in (int, float) or not abs(number) <= _LARGEST:
            _refuse(f"the geometry of {owner} must hold numbers of at most {_LARGEST:g}, not {_shown(number)}")
    geometry = tuple(float(number) for number in value)
    if min(geometry[SIGMA]) <= 0:
        _refuse(f"sigma_x and sigma_y of {owner} must be greater than 0, not {_shown(value[SIGMA])}")
    if abs(geometry[RHO]) >= 1:
        _refuse(f"rho of {owner} must lie strictly between -1 and 1, not {_shown(value[RHO])}")
    return geometry
