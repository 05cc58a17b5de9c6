# SPDX-License-Identifier: Apache-2.0
"""ViLT's forward against transformers' port with the same random weights, on padded pictures of odd grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples import random_batch, vilt_config
from vlp_jax import systems

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def oracle(config):
    """A `ViltForMaskedLM` of our sizes, LayerNorms of the blocks at the original's 1e-6."""
    model = config.model
    settings = transformers.ViltConfig(
        vocab_size=model.text_embed.vocab_size,
        max_position_embeddings=model.text_embed.length,
        hidden_size=model.width,
        num_hidden_layers=model.fusion.depth,
        num_attention_heads=model.fusion.num_heads,
        intermediate_size=model.fusion.mlp_width,
        image_size=model.patch_embed.grid * model.patch_embed.patch_size,
        patch_size=model.patch_embed.patch_size,
    )
    torch.manual_seed(0)
    net = transformers.ViltForMaskedLM(settings).eval()
    # The port ties the decoder; the original does not.
    net.mlm_score.decoder.weight = torch.nn.Parameter(torch.zeros_like(net.mlm_score.decoder.weight))
    for name, parameter in net.named_parameters():
        # Far from the initial values: a swapped or forgotten tensor must show.
        spread = 0.3 if "norm" in name.lower() and name.endswith("weight") else 0.1
        torch.nn.init.normal_(parameter, 1.0 if spread == 0.3 else 0.0, spread)
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and ("layernorm" in name and "text" not in name):
            module.eps = 1e-6
    return net


def parameters(net, config):
    """The oracle's tensors in our tree."""
    t = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    depth, width, grid = config.model.fusion.depth, config.model.width, config.model.patch_embed.grid

    def linear(name):
        return {"kernel": t[name + ".weight"].T, "bias": t[name + ".bias"]}

    def norm(name):
        return {"scale": t[name + ".weight"], "bias": t[name + ".bias"]}

    def stacked(make, pattern):
        layers = [make(f"vilt.encoder.layer.{i}.{pattern}") for i in range(depth)]
        return jax.tree.map(lambda *xs: np.stack(xs), *layers)

    e = "vilt.embeddings."
    projection = t[e + "patch_embeddings.projection.weight"]
    position = t[e + "position_embeddings"][0]
    attention = {n: stacked(linear, f"attention.attention.{n}") for n in ("query", "key", "value")}
    attention["out"] = stacked(linear, "attention.output.dense")
    return {
        "text_embed": {
            "word": t[e + "text_embeddings.word_embeddings.weight"],
            "position": t[e + "text_embeddings.position_embeddings.weight"],
            "segment": t[e + "text_embeddings.token_type_embeddings.weight"],
            "norm": norm(e + "text_embeddings.LayerNorm"),
        },
        "patch_embed": {
            # [width, 3, p, p] -> rows in the order of our patches: row, column, channel.
            "projection": {
                "kernel": projection.transpose(2, 3, 1, 0).reshape(-1, width),
                "bias": t[e + "patch_embeddings.projection.bias"],
            },
            "class_token": t[e + "cls_token"][0, 0],
            "class_position": position[0],
            "position": position[1:].reshape(grid, grid, width),
        },
        "fusion": {
            "modality": t[e + "token_type_embeddings.weight"],
            "norm": norm("vilt.layernorm"),
            "stack": {
                "layers": {
                    "attention": attention,
                    "norm1": stacked(norm, "layernorm_before"),
                    "norm2": stacked(norm, "layernorm_after"),
                    "mlp": {
                        "hidden": stacked(linear, "intermediate.dense"),
                        "out": stacked(linear, "output.dense"),
                    },
                }
            },
        },
        "pooler": {"dense": linear("vilt.pooler.dense")},
        "mlm_head": {
            "dense": linear("mlm_score.transform.dense"),
            "norm": norm("mlm_score.transform.LayerNorm"),
            "decoder": linear("mlm_score.decoder"),
        },
        "itm_head": {"dense": {"kernel": np.zeros((width, 2), np.float32), "bias": np.zeros(2, np.float32)}},
    }


def pixels(batch, patch):
    """Puts the patches back into zero-padded pictures [batch, 3, height, width] in [-1, 1], and their mask."""
    rows, columns = batch["grid_size"].max(0)
    image = np.zeros((len(batch["grid_size"]), rows * patch, columns * patch, 3), np.float32)
    mask = np.zeros(image.shape[:3], np.int64)
    for b, valid in enumerate(batch["patch_mask"]):
        for n in np.flatnonzero(valid):
            r, c = batch["patch_positions"][b, n] * patch
            image[b, r : r + patch, c : c + patch] = (
                batch["patches"][b, n].reshape(patch, patch, 3) / 127.5 - 1
            )
            mask[b, r : r + patch, c : c + patch] = 1
    return torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(mask)


@pytest.mark.parametrize("width, heads, depth, patch", [(32, 2, 2, 16), (48, 3, 3, 8)])
def test_forward_equals_transformers(width, heads, depth, patch):
    config = vilt_config(
        model__width=width, model__fusion__num_heads=heads, model__fusion__depth=depth,
        data__patch_size=patch, data__image_size=patch * 4,
    )  # fmt: skip
    batch = random_batch(config, 5)
    net = oracle(config)
    image, mask = pixels(batch, patch)
    with torch.no_grad():
        inputs = dict(
            input_ids=torch.tensor(batch["text_ids"]).long(),
            attention_mask=torch.tensor(batch["text_mask"]).long(),
            token_type_ids=torch.zeros(batch["text_ids"].shape, dtype=torch.long),
            pixel_values=image,
            pixel_mask=mask,
        )
        body = net.vilt(**inputs)
        logits = net.mlm_score(body.last_hidden_state[:, : batch["text_ids"].shape[1]])
    system = systems.get("vilt").build(config)
    params = parameters(net, config)
    params["itm_head"]["dense"]["kernel"][:] = np.random.default_rng(0).normal(size=(width, 2))
    batch["mlm_labels"][:] = -1  # nothing corrupted: logits at the named positions of the plain text
    with jax.default_matmul_precision("highest"):
        ours = system.predict["fuse"](
            params,
            {**system.predict["encode_text"](params, batch), **system.predict["encode_image"](params, batch)},
        )
        filled = system.predict["fill"](params, batch)["logits"]
    close(ours["pooled"], body.pooler_output)
    text = body.last_hidden_state[:, : batch["text_ids"].shape[1]].numpy()
    close(ours["text"][batch["text_mask"]], text[batch["text_mask"]])
    rows = np.arange(5)[:, None]
    close(filled, logits.numpy()[rows, batch["mlm_positions"]])


def close(ours, reference):
    """DESIGN.md section 5: max|d| <= 1e-5 x max(1, max|reference|)."""
    reference = np.asarray(reference)
    bound = 1e-5 * max(1.0, float(np.abs(reference).max()))
    assert float(jnp.abs(ours - reference).max()) <= bound
