"""Edits of an editor: as text, and as what they do to tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from gpstoken_diffusers.comfyui_nodes.layout_edits import AddedToken, LayoutEdits, layout_fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st

from gpstoken_diffusers import GPSTokens
from gpstoken_diffusers.token_editing import delete_tokens, deleted_tokens

PLACE = (0.2, 0.1, 0.5, -0.25, 0.75)
STATE = {
    "version": 2,
    "num_tokens": 6,
    "fingerprint": None,
    "changed": {"4": list(PLACE)},
    "deleted": [1],
    "added": [{"from": 1, "geometry": [0.3, 0.3, 0, 0, 0]}],
}


def some_tokens(num_tokens=6, batch_size=1, tile_grid=(1, 1), channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    geometry = torch.rand(batch_size, num_tokens, 5, generator=generator) * 0.5 + 0.1
    texture = torch.randn(batch_size, num_tokens, channels, generator=generator)
    return GPSTokens(geometry, texture, (64, 64), tile_grid)


def edited_state(**changes):
    return json.dumps(STATE | changes)


# Text


def test_reads_what_the_editor_writes():
    edits = LayoutEdits.parse(json.dumps(STATE))
    assert edits.num_tokens == 6
    assert edits.changed == {4: PLACE}
    assert edits.deleted == (1,)
    assert edits.added == (AddedToken(1, (0.3, 0.3, 0.0, 0.0, 0.0)),)
    assert edits.fingerprint is None and not edits.is_empty


def test_reads_what_older_editors_wrote():
    older = {key: value for key, value in STATE.items() if key != "fingerprint"} | {"version": 1}
    edits = LayoutEdits.parse(json.dumps(older))
    assert edits == LayoutEdits.parse(json.dumps(STATE))
    edits.apply(some_tokens(seed=1))  # of whatever layout they were
    with pytest.raises(ValueError, match='an unknown key "fingerprint"'):
        LayoutEdits.parse(edited_state(version=1))


@pytest.mark.parametrize("text", ["", " \n", edited_state(changed={}, deleted=[], added=[])])
def test_no_edits(text):
    edits = LayoutEdits.parse(text)
    assert edits.is_empty and edits.to_json() == ""
    tokens = some_tokens(num_tokens=3, batch_size=2)
    assert edits.apply(tokens) is tokens


GEOMETRIES = st.tuples(
    st.floats(1e-5, 10), st.floats(1e-5, 10), st.floats(-0.999999, 0.999999), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)
)


@st.composite
def all_edits(draw):
    num_tokens = draw(st.integers(1, 40))
    indices = st.integers(0, num_tokens - 1)
    deleted = draw(st.sets(indices))
    changed = (
        draw(st.dictionaries(indices.filter(lambda index: index not in deleted), GEOMETRIES))
        if len(deleted) < num_tokens
        else {}
    )
    added = draw(st.lists(st.builds(AddedToken, indices, GEOMETRIES), max_size=5))
    fingerprint = draw(st.sampled_from([None, layout_fingerprint(some_tokens(num_tokens))]))
    return LayoutEdits(num_tokens, changed, tuple(sorted(deleted)), tuple(added), fingerprint)


@given(all_edits())
@settings(max_examples=60, deadline=None)
def test_text_and_back(edits):
    text = edits.to_json()
    assert " " not in text
    if not edits.is_empty:
        assert LayoutEdits.parse(text) == edits


@given(all_edits())
@settings(max_examples=60, deadline=None)
def test_whatever_the_edits_the_result_is_sound(edits):
    tokens = some_tokens(edits.num_tokens)
    left = edits.num_tokens - len(edits.deleted) + len(edits.added)
    if left == 0:
        with pytest.raises(ValueError, match="delete every token"):
            edits.apply(tokens)
        return
    edited = edits.apply(tokens).validate()
    assert edited.num_tokens == left
    assert not deleted_tokens(edited).any()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", r"not a JSON object but \[\]"),
        ("null", "not a JSON object"),
        ('{"version": 1, "version": 1}', "a key twice"),
        (edited_state(version=3), "of version 3, this package knows those up to 2: update"),
        (edited_state(version=0), "of version 0"),
        (edited_state(version=True), "of version true"),
        (json.dumps({key: value for key, value in STATE.items() if key != "added"}), "they lack added"),
        (json.dumps({key: value for key, value in STATE.items() if key != "version"}), "they lack version"),
        (json.dumps({key: value for key, value in STATE.items() if key != "fingerprint"}), "they lack fingerprint"),
        (edited_state(fingerprint=[1] * 7), r"fingerprint must be 8 integers or null, not \[1, 1"),
        (edited_state(fingerprint=[1.0] * 8), "fingerprint must be 8 integers or null"),
        (edited_state(fingerprint="a1"), 'fingerprint must be 8 integers or null, not "a1"'),
        (edited_state(moved={}), 'they have an unknown key "moved"'),
        (edited_state(num_tokens=0), "num_tokens must be an integer of at least 1, not 0"),
        (edited_state(num_tokens="6"), 'num_tokens must be an integer of at least 1, not "6"'),
        (edited_state(changed=[]), r"changed must be an object, not \[\]"),
        (edited_state(deleted={}), r"deleted must be a list"),
        (edited_state(added={}), r"added must be a list"),
        (edited_state(changed={"6": PLACE}), "keys of changed must hold integers from 0 to 5, not 6"),
        (edited_state(changed={"-1": PLACE}), 'keys of changed must be integers, not "-1"'),
        (edited_state(changed={"04": PLACE}), 'keys of changed must be integers, not "04"'),
        (edited_state(changed={"٤": PLACE}), "keys of changed must be integers"),
        (edited_state(changed={"9" * 5000: PLACE}), "keys of changed must be integers"),
        (edited_state(deleted=[6]), "deleted must hold integers from 0 to 5, not 6"),
        (edited_state(deleted=[1.0]), "deleted must hold integers"),
        (edited_state(deleted=[True]), "deleted must hold integers"),
        (edited_state(deleted=[2, 2]), "deleted names a token twice"),
        (edited_state(deleted=[4]), "token 4 is both changed and deleted"),
        (edited_state(added=[3]), "added token 0 must be an object, not 3"),
        (edited_state(added=[{"from": 0}]), "added token 0 lacks geometry"),
        (edited_state(added=[{"from": 6, "geometry": PLACE}]), "from of added token 0 must hold integers"),
        (edited_state(added=[{"from": 0, "geometry": PLACE, "x": 1}]), 'added token 0 has an unknown key "x"'),
        (edited_state(changed={"4": PLACE[:4]}), "geometry of token 4 must be five numbers"),
        (edited_state(changed={"4": ["1", *PLACE[1:]]}), 'must hold numbers of at most 100, not "1"'),
        (edited_state(changed={"4": [True, *PLACE[1:]]}), "must hold numbers"),
        (edited_state(changed={"4": [float("nan"), *PLACE[1:]]}), "must hold numbers of at most 100, not NaN"),
        (edited_state(changed={"4": [*PLACE[:4], float("inf")]}), "must hold numbers of at most 100, not Infinity"),
        (edited_state(changed={"4": [*PLACE[:4], 10**400]}), "must hold numbers of at most 100, not 1000"),
        (edited_state(changed={"4": [0, *PLACE[1:]]}), r"sigma_x and sigma_y of token 4 must be greater than 0"),
        (edited_state(changed={"4": [0.1, -0.1, *PLACE[2:]]}), "must be greater than 0"),
        (edited_state(changed={"4": [0.1, 0.1, 1, 0, 0]}), "rho of token 4 must lie strictly between -1 and 1, not 1"),
        (edited_state(changed={"4": [0.1, 0.1, -1.5, 0, 0]}), "rho of token 4"),
    ],
)
def test_damaged_text_is_refused_with_advice(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        LayoutEdits.parse(text)
    assert "Press Reset in the editor" in str(caught.value) or "press Reset in the editor" in str(caught.value)
    assert len(str(caught.value)) < 300


# Tokens


@pytest.mark.parametrize("channels", [3, 1])
def test_change_delete_and_add(channels):
    tokens = some_tokens(channels=channels)
    before = tokens.clone()
    edited = LayoutEdits.parse(json.dumps(STATE)).apply(tokens)
    kept = [0, 2, 3, 4, 5]
    geometry = before.geometry[:, kept]
    geometry[0, 3] = torch.tensor(PLACE)
    assert torch.equal(edited.geometry[:, :5], geometry)
    assert torch.equal(edited.geometry[0, 5], torch.tensor([0.3, 0.3, 0, 0, 0]))
    # What came shows what the deleted token showed.
    assert torch.equal(edited.texture, before.texture[:, [*kept, 1]])
    assert torch.equal(tokens.geometry, before.geometry) and torch.equal(tokens.texture, before.texture)


def test_changes_alone_keep_places_and_the_rest_exactly():
    tokens = delete_tokens(some_tokens(), torch.arange(6) == 2)
    edited = LayoutEdits(6, {4: PLACE}).apply(tokens)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(edited.geometry[:, others], tokens.geometry[:, others])
    assert torch.equal(edited.texture, tokens.texture)


def test_layouts_stay_layouts():
    layout = GPSTokens.from_geometry(some_tokens().geometry, (64, 64))
    assert layout.is_layout and LayoutEdits.parse(json.dumps(STATE)).apply(layout).is_layout
    assert not some_tokens(channels=1).is_layout and not some_tokens().is_layout


def test_what_was_added_belongs_to_the_tile_of_its_source():
    tokens = some_tokens(num_tokens=8, tile_grid=(2, 2))
    edited = LayoutEdits(8, {}, (0, 2), (AddedToken(5, PLACE), AddedToken(4, PLACE))).apply(tokens)
    assert edited.tokens_per_tile == 4  # the third tile has two and gets two
    assert deleted_tokens(edited)[0].tolist() == [
        *(False, True, True, True),
        *(False, True, True, True),
        *(False,) * 4,
        *(False, False, True, True),
    ]
    assert torch.equal(edited.texture[0, [0, 4, 8, 9, 10, 11]], tokens.texture[0, [1, 3, 4, 5, 5, 4]])


def test_numbers_stay_within_the_bounds():
    edited = LayoutEdits(
        6, {0: (1e-9, 1e-60, 1 - 1e-12, 0, 0)}, (), (AddedToken(0, (1e-9, 1, -1 + 1e-12, 0, 0)),)
    ).apply(some_tokens())
    assert edited.validate().geometry[0, 0, :2].tolist() == pytest.approx([1e-5, 1e-5])
    assert edited.geometry[0, 6, :3].tolist() == pytest.approx([1e-5, 1, -1 + 1e-6])


def test_edits_of_other_tokens_are_refused():
    edits = LayoutEdits.parse(json.dumps(STATE))
    with pytest.raises(ValueError, match="made for 6 tokens, these are 8: press Reset in the editor"):
        edits.apply(some_tokens(num_tokens=8))
    with pytest.raises(ValueError, match="These are 2 pictures, but edits belong to one"):
        edits.apply(some_tokens(batch_size=2))
    for token in (1, 4):
        with pytest.raises(ValueError, match=f"token {token}, which had been deleted before"):
            edits.apply(delete_tokens(some_tokens(), torch.arange(6) == token))
    with pytest.raises(ValueError, match="delete every token"):
        LayoutEdits(6, {}, (0, 1, 2, 4, 5)).apply(delete_tokens(some_tokens(), torch.arange(6) == 3))


# Layouts


def edits_of(tokens):
    return LayoutEdits(tokens.num_tokens, {3: PLACE}, fingerprint=layout_fingerprint(tokens))


def with_noise(tokens, rms):
    noise = torch.randn(tokens.geometry.shape, generator=torch.Generator().manual_seed(9))
    return replace(tokens, geometry=tokens.geometry + rms * noise)


def test_fingerprints_are_the_same_for_ever():
    # Saved workflows have them: what they are computed from must not change.
    tokens = GPSTokens.from_geometry(torch.arange(20.0).reshape(1, 4, 5) / 20, (64, 64))
    assert layout_fingerprint(tokens) == (-2012, 2012, 2012, 4919, 5814, 2012, -4919, -4472)
    assert layout_fingerprint(some_tokens(channels=3)) == layout_fingerprint(some_tokens(channels=1))
    with pytest.raises(ValueError, match="of one picture, these are 2"):
        layout_fingerprint(some_tokens(batch_size=2))


@pytest.mark.parametrize("num_tokens", [6, 64, 1000])
@pytest.mark.parametrize("rms, foreign", [(0.0, False), (1e-6, False), (2e-3, False), (0.05, True), (0.4, True)])
def test_noise_of_arithmetic_keeps_edits_and_another_layout_does_not(num_tokens, rms, foreign):
    tokens = some_tokens(num_tokens)
    edits = edits_of(tokens)
    other = with_noise(tokens, rms)
    assert edits.is_foreign_to(other) is foreign
    if foreign:
        with pytest.raises(ValueError, match="made on another layout.*press Apply anyway or Reset in the editor"):
            edits.apply(other)
    assert replace(edits, fingerprint=None).apply(other).geometry[0, 3].tolist() == pytest.approx(PLACE)


def test_the_order_of_tokens_belongs_to_a_layout():
    tokens = some_tokens(64)
    assert edits_of(tokens).is_foreign_to(replace(tokens, geometry=tokens.geometry.flip(1)))


def test_what_cannot_be_foreign():
    tokens, other = some_tokens(), some_tokens(seed=1)
    fingerprint = layout_fingerprint(tokens)
    assert edits_of(tokens).is_foreign_to(other)
    assert not LayoutEdits(6, fingerprint=fingerprint).is_foreign_to(other)  # they change nothing
    assert not edits_of(tokens).is_foreign_to(some_tokens(batch_size=2))
    assert not edits_of(tokens).is_foreign_to(some_tokens(num_tokens=8))
    # Numbers that no float holds.
    assert LayoutEdits(6, {3: PLACE}, fingerprint=(10**400,) * 8).is_foreign_to(tokens)
