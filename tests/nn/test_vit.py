import copy
import io

import golden
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dinofast import VisionTransformer, vit_base, vit_small, vit_tiny
from dinofast.nn.drop_path import draw_scales
from dinofast.nn.packing import layout, resampling

TINY = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3)


@pytest.fixture(scope="module")
def official():
    model = VisionTransformer(img_size=[32], **TINY)
    model.load_state_dict(golden.load("vit.npz", "state."))
    return model.eval()


@pytest.mark.parametrize("size", ["native", "local", "large", "wide"])
def test_official_outputs(official, size):
    case = golden.load("vit.npz", f"{size}.")
    with torch.no_grad():
        torch.testing.assert_close(official(case["x"]), case["cls"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            official.get_last_selfattention(case["x"]), case["attention"], rtol=1e-5, atol=1e-6
        )
        layers = torch.stack(official.get_intermediate_layers(case["x"], n=2))
        torch.testing.assert_close(layers, case["layers"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, millions", [(vit_tiny, 5.52), (vit_small, 21.67), (vit_base, 85.80)]
)
def test_published_sizes(make, millions):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_initialization_is_the_official_one():
    torch.manual_seed(0)
    model = vit_tiny()
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert (
        not model.blocks[0].mlp.fc1.bias.any()
        and (model.norm.weight == 1).all()
        and model.norm.eps == 1e-6
    )


def test_stochastic_depth_grows_over_the_depth():
    model = VisionTransformer(img_size=[32], drop_path_rate=0.2, **TINY)
    assert model.drop_path_rates == pytest.approx([0.0, 0.1, 0.2])


def test_positions_receive_gradient_through_interpolation():
    model = VisionTransformer(img_size=[32], **TINY)
    model(torch.randn(2, 3, 16, 16))[:, 0].sum().backward()
    assert model.pos_embed.grad[:, 1:].abs().sum() > 0


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="embed_dim 50 .* num_heads 3"):
        VisionTransformer(embed_dim=50, num_heads=3)


# ---- all crops as one packed sequence
def build(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return VisionTransformer(img_size=[32], **{**TINY, **options}).to(dtype)


def images(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, h, w, generator=generator).to(dtype) for n, h, w in sizes]


SIZES = (3, 32, 32), (5, 16, 16), (1, 24, 40), (2, 32, 32)


def plainly(model, x, scales=None):
    """The model's formula for images of one size: a convolution, whole attention, all tokens.
    scales: (2, B) for each block."""
    p, g, table = model.patch_embed.patch_size, model.grid, model.pos_embed
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=p)
    rows, cols = patches.shape[2:]
    if x.shape[2] != x.shape[3] or rows != g:
        table = torch.cat((table[:, :1], resample(table[:, 1:], g, rows, cols)), dim=1)
    tokens = (
        torch.cat((model.cls_token.expand(len(x), -1, -1), patches.flatten(2).mT), dim=1) + table
    )
    for i, block in enumerate(model.blocks):
        attend, mlp = (
            torch.ones(2, len(x), dtype=x.dtype)
            if scales is None or scales[i] is None
            else scales[i].to(x.dtype)
        )
        q, k, v = (
            block.attn.qkv(block.norm1(tokens))
            .unflatten(2, (3, block.attn.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        tokens = (
            tokens
            + block.attn.proj((weights @ v).transpose(1, 2).flatten(2)) * attend[:, None, None]
        )
        tokens = (
            tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens)))) * mlp[:, None, None]
        )
    return model.norm(tokens)


def resample(table, grid, rows, cols):
    square = table.mT.unflatten(2, (grid, grid))
    return (
        F.interpolate(
            square, scale_factor=((rows + 0.1) / grid, (cols + 0.1) / grid), mode="bicubic"
        )
        .flatten(2)
        .mT
    )


def assert_same(model, ours, expected, rtol=1e-10, atol=1e-11):
    """Values, and gradients of all parameters."""
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours.dtype)
    both = [torch.autograd.grad(x, list(model.parameters()), upstream) for x in (ours, expected)]
    for (name, _), a, b in zip(model.named_parameters(), *both, strict=True):
        torch.testing.assert_close(
            a,
            b,
            rtol=rtol,
            atol=atol * max(1, b.abs().max()),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_packed_pass_equals_a_pass_per_size(attention):
    model, crops = build(), images(*SIZES)
    for block in model.blocks:
        block.attn.impl = attention
    assert_same(model, model(crops), torch.cat([model(x) for x in crops]))


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": False}, {"depth": 1}, {"patch_size": 4, "num_heads": 1}],
    ids=["usual", "no qkv bias", "one block", "small patches"],
)
def test_packed_pass_is_the_formula(options):
    """1e-7: the matrix that resamples positions is float32, the formula's here float64."""
    model, crops = build(**options), images(*SIZES)
    assert_same(
        model, model(crops), torch.cat([plainly(model, x)[:, 0] for x in crops]), 1e-7, 1e-7
    )


@pytest.mark.parametrize("size", [(35, 35), (23, 17), (41, 32), (8, 8), (8, 40), (64, 16)])
def test_sides_that_are_no_multiple_of_the_patch_give_what_a_convolution_gives(size):
    model, (x,) = build(), images((2, *size))
    assert_same(model, model(x), plainly(model, x)[:, 0], 1e-7, 1e-7)
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(model(channels_last), model(x))


def test_only_square_images_of_the_native_grid_take_the_learned_positions_as_they_are():
    """As the official code decides. Values alone: for equal grids torch's backward of `interpolate`
    ignores the scale."""
    model, crops = build(), images((1, 32, 32), (1, 39, 39), (1, 39, 32), (1, 32, 33), (1, 16, 64))
    assert [matrix is None for matrix in model.patchify(crops).resampling] == [
        True,
        True,
        False,
        False,
        False,
    ]
    torch.testing.assert_close(
        model(crops), torch.cat([plainly(model, x)[:, 0] for x in crops]), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (0, 32)])
def test_images_without_a_patch_are_refused(size):
    with pytest.raises(
        ValueError,
        match=f"images of {size[0]} x {size[1]} pixels hold no patch of 8 x 8: give larger",
    ):
        build()([torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, *size)])


@pytest.mark.parametrize("drawn", ["nothing", "scales"])
def test_cls_only_last_block_is_the_cls_rows_of_the_whole(drawn):
    model, where = build(), layout(((3, 17), (4, 5), (2, 1)), torch.device("cpu"))
    block, x = model.blocks[-1], torch.randn(73, 48, dtype=torch.float64, requires_grad=True)
    branches = {"nothing": lambda *_: [None], "scales": draw_scales}[drawn]([0.5], where)[0]
    alone, whole = block(x, where, branches, cls_only=True), block(x, where, branches)[where.cls]
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-13)
    upstream, leaves = torch.randn_like(alone), [x, *block.parameters()]
    for a, b in zip(
        *[torch.autograd.grad(y, leaves, upstream) for y in (alone, whole)], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_first_patches():
    model, crops = build(), images(*SIZES)
    packed = model.patchify(crops)
    for k in range(1, 4):
        first, alone = packed.first(k), model.patchify(crops[:k])
        assert (
            torch.equal(first.pixels, alone.pixels)
            and first.pixels.data_ptr() == packed.pixels.data_ptr()
        )
        assert (
            first.grids == alone.grids
            and first.layout is alone.layout
            and len(first.resampling) == k
        )
        assert torch.equal(model(first), model(crops[:k]))


@pytest.mark.parametrize("rows, cols", [(1, 1), (2, 7), (4, 4), (6, 6), (13, 3)])
def test_resampling_is_the_bicubic_one_of_torch(rows, cols):
    """1e-6: the matrix is float32. The gradient g of a linear map M to upstream u holds <g, t> =
    <u, M t> for every t."""
    model = build()
    ours = model.positions(resampling(model.grid, rows, cols, torch.device("cpu")))
    expected = resample(model.pos_embed[:, 1:], model.grid, rows, cols)[0]
    torch.testing.assert_close(
        ours, torch.cat((model.pos_embed[0, :1], expected)), rtol=1e-6, atol=1e-7
    )
    upstream, t = torch.randn_like(ours), torch.randn_like(model.pos_embed)
    gradient = torch.autograd.grad(ours, model.pos_embed, upstream)[0]
    assert torch.equal(gradient[0, 0], upstream[0])
    torch.testing.assert_close(
        (gradient * t)[:, 1:].sum(),
        (upstream[1:] * resample(t[:, 1:], model.grid, rows, cols)).sum(),
        rtol=1e-6,
        atol=1e-6,
    )


def test_positions_are_resampled_in_full_precision_under_autocast():
    model = build(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        matrix = resampling(4, 2, 9, torch.device("cpu"))
        inside = model.positions(matrix)
    assert torch.equal(inside, model.positions(matrix)) and inside.dtype == torch.float32
    assert model(torch.randn(2, 3, 16, 72)).dtype == torch.float32


def test_attention_maps_and_layers_drop_nothing_while_training():
    model, (x,) = build(drop_path_rate=0.9), images((4, 32, 16))
    assert torch.equal(
        model.train().get_last_selfattention(x), model.eval().get_last_selfattention(x)
    )
    assert model.get_last_selfattention(x).shape == (4, 3, 9, 9)
    torch.testing.assert_close(
        model.train().get_intermediate_layers(x)[0], plainly(model, x), rtol=1e-7, atol=1e-7
    )


# ---- what is kept from one pass to the next
def test_inference_first_then_training_in_the_same_shapes():
    # shapes of no other test
    model, crops = build(drop_path_rate=0.35), images((6, 32, 32), (7, 48, 8))
    with torch.inference_mode():
        model(crops)
    model(crops).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_fake_tensors_leave_nothing_behind():
    # shapes of no other test
    model, crops = build(drop_path_rate=0.15), images((9, 32, 32), (2, 56, 8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(crops)
    assert type(model(crops)) is torch.Tensor


def test_export_is_the_model_and_leaves_nothing_behind():
    model, (x,) = build(torch.float32).eval(), images((3, 72, 8), dtype=torch.float32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.filterwarnings("error:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_into_one_graph():
    model = build(torch.float32, depth=2, drop_path_rate=0.3)
    crops = images((4, 32, 32), (4, 16, 24), dtype=torch.float32)
    outputs = []
    for m in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        torch.manual_seed(4)
        outputs.append(m(crops))
    assert_same(model, *outputs, 1e-5, 1e-5)


def test_meta_device():
    with torch.device("meta"):
        model = VisionTransformer(img_size=[32], drop_path_rate=0.5, **TINY)
    out = model(
        [torch.empty(2, 3, 32, 32, device="meta"), torch.empty(3, 3, 16, 24, device="meta")]
    )
    assert out.shape == (5, 48) and out.is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype_stays_in_it(dtype):
    model, crops = build(dtype, drop_path_rate=0.5), images(*SIZES, dtype=dtype)
    out = model(crops)
    out.float().sum().backward()
    assert out.dtype == dtype and all(torch.isfinite(p.grad).all() for p in model.parameters())
    exact = copy.deepcopy(model).double().eval()([x.double() for x in crops])
    error = (model.eval()(crops) - exact).abs().max().item()
    # a few roundings over three blocks
    assert error <= 8 * torch.finfo(dtype).eps * exact.abs().max().item()


def test_copies_and_pickles_are_the_model():
    model, crops = build(drop_path_rate=0.5), images(*SIZES)
    model.blocks[0].attn.impl = "eager"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        outputs = []
        for m in (model, other):
            torch.manual_seed(3)
            outputs.append(m(crops))
        assert torch.equal(*outputs) and other.blocks[0].attn.impl == "eager"
        other.pos_embed.data.zero_()
        assert model.pos_embed.any()
