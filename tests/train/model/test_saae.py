"""The autoencoder against the paper: Table 1, the shapes of section 3.2, and what decoding in parallel allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from saae_runtime.errors import ConfigError
from saae_train.model.saae import HEADS, SAAE, Attention, check_shape, from_patches, latent_width, to_patches


def shaken(model: SAAE, seed: int = 0) -> SAAE:
    """Every parameter and statistic away from its initial value."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(("channels", "latent"), [(3840, 300), (3840, 261), (101, 12)])
def test_table_1(channels: int, latent: int) -> None:
    with torch.device("meta"):
        model = SAAE(channels, latent, 576)
    middle = (channels + 2 * latent) // 2
    rows = [  # Conv1 .. Conv6: channels in, channels out
        (channels, middle),
        (middle, 2 * latent),
        (2 * latent, latent),
        (latent, 2 * latent),
        (2 * latent, middle),
        (middle, channels),
    ]
    convs = [*model.encoder.convs, *model.decoder.convs]
    assert [(conv.in_features, conv.out_features) for conv in convs] == rows
    # BN and activation on conv 1, 2, 4 and 5 alone.
    assert [norm.num_features for norm in model.encoder.norms] == [middle, 2 * latent]
    assert [norm.num_features for norm in model.decoder.norms] == [2 * latent, middle]


@pytest.mark.parametrize("mlp_size", [12, 24, None])
def test_transformer_shapes(mlp_size: int | None) -> None:
    model = SAAE(40, 12, 35, mlp_size)
    assert model.position.shape == model.queries.shape == (1, 35, 12)
    assert model.embed.weight.shape == model.project.weight.shape == (12, 12)  # E = V, patch size 1 x 1
    hidden = mlp_size or 24
    for half in (model.transformer_encoder, model.transformer_decoder):
        assert half.mlp[0].weight.shape == (hidden, 12)
        assert half.mlp[2].weight.shape == (12, hidden)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 3  # depth 1: self in the encoder; self and cross in the decoder
    assert all(attention.heads == HEADS == 3 for attention in attentions)


@pytest.mark.parametrize("transformer", [True, False])
def test_output_has_the_shape_of_the_input(transformer: bool) -> None:
    f = torch.randn(4, 20, 33)
    model = SAAE(33, 6, 20, transformer=transformer)
    assert model(f).shape == f.shape
    assert model.eval()(f[:1]).shape == (1, 20, 33)


@pytest.mark.parametrize(("latent", "hint"), [(10, "--latent 9"), (2, "--latent 3"), (0, "--latent 3"), (11, "12")])
def test_latent_must_be_a_multiple_of_the_heads(latent: int, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"latent width of {latent} is not possible") as caught:
        SAAE(40, latent, 4)
    assert hint in caught.value.cure


def test_cae_is_the_coders_alone() -> None:
    model = shaken(SAAE(20, 6, 9, transformer=False))
    f = torch.randn(2, 9, 20)
    torch.testing.assert_close(model(f), model.decoder(model.encoder(f)))
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "decoder"}
    # Without a transformer each position is on its own.
    order = torch.randperm(9)
    torch.testing.assert_close(model(f[:, order]), model(f)[:, order])


def test_coder_is_pointwise_convolution_as_torch_does_it() -> None:
    model = shaken(SAAE(20, 6, 12, transformer=False))
    coder = model.encoder
    layers: list[nn.Module] = []
    for index, linear in enumerate(coder.convs):
        conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
        conv.weight.data, conv.bias.data = linear.weight.data[:, :, None, None], linear.bias.data
        layers.append(conv)
        if index < 2:
            norm = nn.BatchNorm2d(linear.out_features)
            norm.load_state_dict(coder.norms[index].state_dict())
            layers += [norm, nn.ReLU()]
    f = torch.randn(2, 12, 20)
    for training in (False, True):
        reference = nn.Sequential(*layers).train(training)
        image = f.transpose(1, 2).reshape(2, 20, 3, 4)
        expected = reference(image).flatten(2).transpose(1, 2)
        torch.testing.assert_close(coder.train(training)(f), expected, rtol=1e-4, atol=1e-5)


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours = Attention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias]).detach()
    theirs.out_proj.load_state_dict(ours.project.state_dict())
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    expected, _ = theirs(x, memory, memory, need_weights=False)
    torch.testing.assert_close(ours(x, memory), expected)


def test_the_queries_talk_once_for_all_frames() -> None:
    model = shaken(SAAE(20, 12, 9))
    f = torch.randn(5, 9, 20)
    memory = model.transformer_encoder(model.embed(model.encoder(f)) + model.position)
    # The same, written out with the queries repeated for every frame.
    decoder = model.transformer_decoder
    x = (model.queries + model.position).repeat(5, 1, 1)
    y = decoder.norm1(x)
    x = x + decoder.self_attention(y, y)
    x = x + decoder.cross_attention(decoder.norm2(x), memory + model.position)
    x = decoder.norm(x + decoder.mlp(decoder.norm3(x)))
    torch.testing.assert_close(model(f), model.decoder(model.project(x)))
    # And frames do not see each other.
    torch.testing.assert_close(model(f)[2:3], model(f[2:3]))

    lengths = []
    handle = decoder.self_attention.register_forward_hook(lambda *arguments: lengths.append(len(arguments[2])))
    model(f)
    handle.remove()
    assert lengths == [1]


def test_every_position_sees_every_other() -> None:
    model = shaken(SAAE(20, 12, 9))
    f = torch.randn(1, 9, 20, requires_grad=True)
    model(f)[0, 0].sum().backward()
    assert f.grad is not None
    assert (f.grad[0].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("transformer", [True, False])
def test_gradient_reaches_every_parameter(transformer: bool) -> None:
    torch.manual_seed(0)
    model = SAAE(20, 12, 9, transformer=transformer)
    f = torch.randn(8, 9, 20)
    (f - model(f)).square().sum(dim=2).sqrt().sum().backward()  # eq. (2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        reached = parameter.grad.abs() > 0
        # Exactly zero are only those that cancel: the bias under a softmax's keys.
        assert reached.float().mean() > 0.3, name


def test_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    model = SAAE(16, 6, 12)
    base = torch.randn(1, 12, 16)
    f = base + 0.5 * torch.randn(16, 1, 3) @ torch.randn(3, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = functional.mse_loss(model(f), f)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


# --- V ---


def brute_force_width(values: list[float], keep: float) -> int:
    descending = sorted((max(value, 0.0) for value in values), reverse=True)
    total = sum(descending)
    for count in range(1, len(values) + 1):
        if sum(descending[:count]) / total >= keep - 1e-12:
            break
    while count % 3:
        count += 1
    return count


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.sampled_from([0.1, 0.5, 0.8, 0.95]))
def test_latent_width_by_brute_force(values: list[int], keep: float) -> None:
    shares = torch.tensor(values, dtype=torch.float64)
    found = latent_width(shares, keep)
    assert found % 3 == 0
    # Where a share falls on `keep` exactly, rounding may decide either way.
    allowed = {brute_force_width([float(v) for v in values], keep + shift) for shift in (-1e-9, 0.0, 1e-9)}
    assert found in allowed
    assert latent_width(shares.flip(0), keep) == found


def test_latent_width_by_hand() -> None:
    assert latent_width(torch.tensor([5.0, 3.0, 1.0, 1.0])) == 3  # 2 keep 80 %, rounded up to 3
    assert latent_width(torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0])) == 6  # 4 needed
    assert latent_width(torch.tensor([1.0, 1e-9, -1e-3])) == 3  # rounding below zero does not count
    assert latent_width(torch.ones(10), keep=1.0) in (9, 12)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_patches_are_cut_as_torch_cuts_them(patch: int, rows: int, columns: int, channels: int, batch: int) -> None:
    grid = (rows * patch, columns * patch)
    x = torch.randn(batch, grid[0] * grid[1], channels)
    patches = to_patches(x, grid, patch)
    image = x.transpose(1, 2).reshape(batch, channels, *grid)
    cut = functional.unfold(image, patch, stride=patch)  # [N, C * p * p, patches], channels first
    expected = cut.unflatten(1, (channels, patch * patch)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(patches, expected)
    assert torch.equal(from_patches(patches, grid, patch), x)


def test_patch_size_8_as_the_paper_has_it_with_vgg19() -> None:
    """Section 4.3: 64 x 64 x 3456 features, patch size 8: 64 tokens as wide as V."""
    with torch.device("meta"):
        model = SAAE(3456, 300, 64 * 64, grid=(64, 64), patch=8)
        assert model(torch.empty(2, 64 * 64, 3456)).shape == (2, 64 * 64, 3456)
    assert model.position.shape == model.queries.shape == (1, 64, 300)
    assert model.embed.weight.shape == (300, 8 * 8 * 300)
    assert model.project.weight.shape == (8 * 8 * 300, 300)
    assert model.transformer_encoder.mlp[0].weight.shape == (600, 300)


def test_a_patch_is_one_token() -> None:
    """What the transformer gives a patch goes to the patch's own positions, row by row of the grid."""
    grid, patch = (4, 6), 2
    model = shaken(SAAE(20, 12, 24, grid=grid, patch=patch))
    f = torch.randn(2, 24, 20)
    tokens = []
    latent = model.encoder(f).unflatten(1, grid)
    for row in range(0, 4, patch):
        for column in range(0, 6, patch):
            tokens.append(latent[:, row : row + patch, column : column + patch].flatten(1))
    memory = model.transformer_encoder(model.embed(torch.stack(tokens, 1)) + model.position)
    out = model.project(model.transformer_decoder(model.queries + model.position, memory, model.position))
    expected = torch.zeros(2, *grid, 12)
    for number, values in enumerate(out.unbind(1)):
        row, column = 2 * (number // 3), 2 * (number % 3)
        expected[:, row : row + patch, column : column + patch] = values.reshape(2, patch, patch, 12)
    torch.testing.assert_close(model(f), model.decoder(expected.flatten(1, 2)))


@pytest.mark.parametrize(
    ("grid", "patch", "hint"), [((60, 64), 8, "--saae-patch 4"), ((7, 9), 2, "--saae-patch 1"), (None, 2, "1")]
)
def test_a_patch_must_divide_the_grid(grid: tuple[int, int] | None, patch: int, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"patches of {patch} x {patch}") as caught:
        SAAE(20, 12, 36, grid=grid, patch=patch)
    assert hint in caught.value.cure
    assert "--input-size" in caught.value.cure
    SAAE(20, 12, 36, transformer=False, grid=grid, patch=patch)  # the CAE has none


def test_what_is_known_before_a_fit_is_said_before_it() -> None:
    check_shape(None, (16, 16), 8)
    with pytest.raises(ConfigError, match="latent width of 10"):
        check_shape(10, (16, 16), 1)
    with pytest.raises(ConfigError, match="patches of 0 x 0"):
        check_shape(12, (16, 16), 0)
