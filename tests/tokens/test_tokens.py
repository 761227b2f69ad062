"""GPSTokens: layout, values, selection, tiles."""

import pytest
import torch
from golden_files import golden
from safetensors.torch import load_file
from token_zoo import GEOMETRY, TEXTURE, assert_same, make_tokens

from gpstoken_diffusers.tokens import CENTER, RHO, SIGMA, GPSTokens

# Layout and values


def test_sizes():
    tokens = make_tokens(2, 12, 7, torch.bfloat16, image_size=(50, 60), tile_grid=(2, 3), canvas_size=(64, 96))
    sizes = (tokens.batch_size, tokens.num_tokens, tokens.texture_channels, tokens.tokens_per_tile)
    assert sizes == (2, 12, 7, 2)
    assert tokens.dtype == torch.bfloat16 and tokens.device == torch.device("cpu") and len(tokens) == 2
    assert tokens.num_floats == 12 * 12
    assert tokens.num_bytes == 12 * (5 * 4 + 7 * 2)
    assert repr(tokens) == (
        "GPSTokens(2 images of 50 x 60 px, 12 tokens in 2 x 3 tiles, 7 texture channels in bfloat16, on cpu; "
        "144 floats = 408 bytes per image)"
    )


def test_sizes_may_be_lists_and_the_canvas_defaults_to_the_image():
    tokens = make_tokens(image_size=[8, 9], tile_grid=[1, 1])
    assert (tokens.image_size, tokens.tile_grid, tokens.canvas_size) == ((8, 9), (1, 1), (8, 9))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"geometry": GEOMETRY[0]}, ValueError, r"geometry must have the shape \(B, N, 5\), not \(6, 5\)"),
        ({"geometry": torch.zeros(1, 6, 4)}, ValueError, r"\(B, N, 5\), not \(1, 6, 4\)"),
        ({"texture": torch.zeros(1, 6)}, ValueError, r"\(B, N, C\), not \(1, 6\)"),
        ({"texture": torch.zeros(1, 7, 2)}, ValueError, r"\(1, 6, 5\) and \(1, 7, 2\)"),
        ({"texture": torch.zeros(2, 6, 2)}, ValueError, "batch size"),
        ({"texture": TEXTURE.to("meta")}, ValueError, "geometry is on cpu but texture is on meta"),
        ({"geometry": GEOMETRY.double()}, TypeError, r"float32, not torch.float64: pass geometry.float\(\)"),
        ({"texture": TEXTURE.int()}, TypeError, "not torch.int32"),
        ({"texture": TEXTURE.numpy()}, TypeError, "texture must be a torch.Tensor, not ndarray"),
        ({"tile_grid": (2, 2)}, ValueError, "6 tokens do not divide evenly into 2 x 2 tiles"),
        ({"canvas_size": (8, 7)}, ValueError, r"canvas_size \(8, 7\) is smaller than image_size \(8, 8\)"),
        ({"tile_grid": (1, 3)}, ValueError, r"canvas_size \(8, 8\) is not 1 x 3 tiles of whole pixels"),
        ({"image_size": (8, 0)}, ValueError, "image_size must be at least 1"),
        ({"image_size": (8, 8.0)}, TypeError, "image_size must be two ints"),
        ({"image_size": 8}, TypeError, "image_size must be two ints"),
        ({"tile_grid": (1, 1, 1)}, TypeError, "tile_grid must be two ints"),
    ],
)
def test_layout_is_checked_at_once(fields, error, message):
    with pytest.raises(error, match=message):
        GPSTokens(**({"geometry": GEOMETRY, "texture": TEXTURE, "image_size": (8, 8)} | fields))


@pytest.mark.parametrize(
    ("channel", "value", "message"),
    [
        (0, 0.0, "sigma_x and sigma_y must be greater than 0, but token 4 of image 1"),
        (1, -0.25, r"\(0.5, -0.25, 0.5, 0.5, 0.5\)"),
        (2, 1.0, "rho must lie strictly between -1 and 1, but token 4 of image 1"),
        (2, -1.5, "rho must lie strictly"),
        (0, float("nan"), r"the geometry must be finite.*\(nan, 0.5"),
        (3, float("inf"), "the geometry must be finite"),
        (6, float("nan"), "the texture must be finite, but token 4 of image 1 .* texture channel 1 is nan"),
        (5, float("-inf"), "texture channel 0 is -inf"),
    ],
)
def test_validate_names_the_first_bad_token(channel, value, message):
    values = torch.full((3, 6, 7), 0.5)
    values[1, 4, channel] = value
    values[2, 1, channel] = value
    with pytest.raises(ValueError, match=message):
        GPSTokens.from_tensor(values, (8, 8)).validate()


def test_validate_refuses_empty_tokens_and_accepts_the_extremes():
    for batch, count in ((0, 6), (2, 0)):
        with pytest.raises(ValueError, match=f"tokens are empty: {batch} images of {count} tokens"):
            make_tokens(batch, count).validate()
    geometry = torch.tensor([[[1e-6, 3.0, 0.999999, -2.0, 2.0]]])
    tokens = GPSTokens(geometry, torch.full((1, 1, 1), 65504.0).half(), (1, 1))
    assert tokens.validate() is tokens


# Moving and selecting


def test_casting_leaves_the_geometry_in_float32():
    tokens = make_tokens()
    for cast in (tokens.to(torch.bfloat16), tokens.to(dtype=torch.bfloat16), tokens.to("cpu", torch.bfloat16)):
        assert cast.dtype == torch.bfloat16
        assert torch.equal(cast.geometry, tokens.geometry) and cast.geometry.dtype == torch.float32
    assert tokens.dtype == torch.float32
    assert tokens.to("meta").device.type == "meta"


def test_clone_and_detach():
    tokens = make_tokens()
    tokens.geometry.requires_grad_()
    copy = tokens.clone()
    copy.texture.zero_()
    assert tokens.texture.any() and copy.geometry.requires_grad
    assert not tokens.detach().geometry.requires_grad
    assert tokens.detach().geometry.data_ptr() == tokens.geometry.data_ptr()


@pytest.mark.parametrize(
    ("index", "chosen"),
    [
        (0, [0]),
        (-1, [3]),
        (-4, [0]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([3, 0, 3], [3, 0, 3]),
        ([], []),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([False, True, False, False]), [1]),
        (torch.tensor([2]), [2]),
    ],
)
def test_choosing_images(index, chosen):
    tokens = make_tokens(4, tile_grid=(2, 2), canvas_size=(64, 64))
    part = tokens[index]
    assert torch.equal(part.geometry, tokens.geometry[chosen])
    assert torch.equal(part.texture, tokens.texture[chosen])
    assert (part.tile_grid, part.canvas_size) == ((2, 2), (64, 64))


def test_choosing_what_is_not_there():
    for index in (4, -5, [4], [True, False]):
        with pytest.raises(IndexError):
            make_tokens(4)[index]
    for index in ("0", True, [0.5], None):
        with pytest.raises(TypeError):
            make_tokens(4)[index]


def test_iteration_and_concatenation_undo_each_other():
    tokens = make_tokens(3, dtype=torch.float16, tile_grid=(2, 2), canvas_size=(64, 64))
    parts = list(tokens)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert_same(GPSTokens.concatenate(parts), tokens)
    with pytest.raises(ValueError, match="empty"):
        GPSTokens.concatenate([])


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (make_tokens(count=10), "num_tokens: 12 and 10"),
        (make_tokens(channels=4), "texture_channels: 3 and 4"),
        (make_tokens(image_size=(48, 63)), "image_size"),
        (make_tokens(canvas_size=(48, 80)), "canvas_size"),
        (make_tokens(tile_grid=(2, 2)), "tile_grid"),
        (make_tokens(dtype=torch.float16), "dtype"),
    ],
)
def test_concatenation_of_what_differs(other, name):
    with pytest.raises(ValueError, match=f"parts 0 and 1 differ in {name}"):
        GPSTokens.concatenate([make_tokens(), other])


# One tensor, and tiles


def test_one_tensor_and_back():
    tokens = make_tokens(tile_grid=(2, 2), canvas_size=(64, 64))
    tensor = tokens.as_tensor()
    assert torch.equal(tensor[..., 0:2], tokens.geometry[..., SIGMA])
    assert torch.equal(tensor[..., 2], tokens.geometry[..., RHO])
    assert torch.equal(tensor[..., 3:5], tokens.geometry[..., CENTER])
    assert_same(GPSTokens.from_tensor(tensor, (48, 64), (2, 2), (64, 64)), tokens)
    assert tokens.to(torch.bfloat16).as_tensor().dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 6, 5), (6, 7), (1, 6, 1, 7)])
def test_one_tensor_of_another_shape(shape):
    with pytest.raises(ValueError, match="must have the shape"):
        GPSTokens.from_tensor(torch.ones(shape), (8, 8))


def test_merge_equals_the_official_one():
    data = load_file(golden("ae_small_512.safetensors"))
    tiles = data["tokens"]
    merged = GPSTokens.merge_tiles(tiles[..., :5], tiles[..., 5:], (2, 2), (512, 512))
    # Two roundings in another order: one step of float32 below 1 is 6e-8.
    torch.testing.assert_close(merged.as_tensor(), data["merged_tokens"], rtol=0, atol=2e-7)


def test_merge_by_hand():
    # Two images of 2 rows x 3 columns; the only token of a tile is a quarter right of and below its middle.
    geometry = torch.tensor([0.6, 0.4, 0.7, 0.5, 0.5]).expand(12, 1, 5)
    texture = torch.arange(12.0).reshape(12, 1, 1)
    merged = GPSTokens.merge_tiles(geometry, texture, (2, 3), (64, 96))
    # A tile is 2/3 wide and 1 high; its right and lower quarter point is 3/4 along it.
    xs = [-1 + (column + 0.75) * 2 / 3 for column in range(3)]
    ys = [-1 + row + 0.75 for row in range(2)]
    expected = torch.tensor([[0.2, 0.2, 0.7, x, y] for y in ys for x in xs])
    for image in range(2):
        torch.testing.assert_close(merged.geometry[image], expected, rtol=0, atol=2e-7)
        assert merged.texture[image, :, 0].tolist() == [6.0 * image + tile for tile in range(6)]
    assert (merged.tile_grid, merged.tokens_per_tile, merged.canvas_size) == ((2, 3), 1, (64, 96))


@pytest.mark.parametrize("tile_grid", [(1, 1), (2, 2), (1, 3), (5, 2)])
def test_split_undoes_merge(tile_grid):
    num_tiles = tile_grid[0] * tile_grid[1]
    tiles = make_tokens(2 * num_tiles, 7)
    merged = GPSTokens.merge_tiles(
        tiles.geometry, tiles.texture, tile_grid, (1, 1), (8 * tile_grid[0], 8 * tile_grid[1])
    )
    assert len(merged) == 2 and merged.num_tokens == 7 * num_tiles
    geometry, texture = merged.split_tiles()
    # Splitting multiplies the rounding of a coordinate (6e-8) by up to 5 tiles.
    torch.testing.assert_close(geometry, tiles.geometry, rtol=0, atol=6e-7)
    assert torch.equal(texture, tiles.texture)


def test_a_single_tile_stays_as_it_is_and_broken_batches_are_refused():
    tokens = make_tokens(6)
    assert_same(GPSTokens.merge_tiles(tokens.geometry, tokens.texture, (1, 1), (48, 64)), tokens)
    with pytest.raises(ValueError, match="6 tiles are not whole images of 2 x 2 tiles"):
        GPSTokens.merge_tiles(tokens.geometry, tokens.texture, (2, 2), (64, 64))


def test_gradients_pass_through_merge_and_split():
    tokens = make_tokens(6)
    geometry, texture = tokens.geometry.requires_grad_(), tokens.texture.requires_grad_()
    merged = GPSTokens.merge_tiles(geometry, texture, (3, 2), (96, 64))
    (merged.as_tensor().sum() + merged.split_tiles()[0].sum()).backward()
    # Merging divides x by 2 and y by 3 (rho by 1); splitting after it is the identity.
    expected = torch.tensor([1 / 2, 1 / 3, 1, 1 / 2, 1 / 3]) + 1
    torch.testing.assert_close(geometry.grad, expected.expand_as(geometry))
    assert torch.equal(texture.grad, torch.ones_like(texture))


def test_tokens_compile_without_a_graph_break():
    def pass_through(geometry, texture):
        tokens = GPSTokens.merge_tiles(geometry, texture, (2, 2), (64, 64)).to(torch.bfloat16)
        return tokens[0], tokens.split_tiles()[0] * tokens.tokens_per_tile

    tiles = make_tokens(8)
    compiled = torch.compile(pass_through, fullgraph=True, backend="eager")
    tokens, split = compiled(tiles.geometry, tiles.texture)
    expected_tokens, expected_split = pass_through(tiles.geometry, tiles.texture)
    assert_same(tokens, expected_tokens)
    assert torch.equal(split, expected_split)
