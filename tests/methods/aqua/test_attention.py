import pytest
import torch
from aqua_cases import Requests
from pages import relative

from vllm_lrqk.methods.aqua.attention import chosen_dimensions
from vllm_lrqk.methods.aqua.settings import AquaSettings

EVERYTHING = AquaSettings(keep=1.0)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of outputs against dense attention: a few roundings of the storage type, on scores of up to about 15."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("kv_heads", "group", "d"), [(1, 1, 16), (2, 3, 32), (1, 8, 80)])
def test_with_every_dimension_decode_and_prefill_equal_dense_attention(dtype, kv_heads, group, d):
    lengths = [63, 500, 1, 17]
    requests = Requests(lengths, EVERYTHING, 16, kv_heads, group, d, dtype)
    prompts = [(r, 0, n - 1) for r, n in enumerate(lengths) if n > 1]
    output = requests.run([], prompts)
    expected = torch.cat([requests.dense(*prompt) for prompt in prompts])
    assert relative(output, expected) < TOLERANCES[dtype]
    output = requests.run([(r, n - 1) for r, n in enumerate(lengths)], [], padding=3)
    expected = torch.cat([requests.dense(r, n - 1, n) for r, n in enumerate(lengths)])
    assert relative(output, expected) < TOLERANCES[dtype]


def test_decode_and_prefill_share_a_step():
    requests = Requests([40, 70], EVERYTHING)
    requests.run([], [(0, 0, 39), (1, 0, 30)])
    output = requests.run([(0, 39)], [(1, 30, 70)], padding=2)
    expected = torch.cat([requests.dense(0, 39, 40), requests.dense(1, 30, 70)])
    assert relative(output, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("config", [EVERYTHING, AquaSettings(stored=0.5), AquaSettings(key_dtype="int8")])
def test_blocks_are_a_function_of_the_tokens_alone(config):
    whole, parts = Requests([150], config), Requests([150], config)
    whole.run([], [(0, 0, 150)])
    for first, end in ((0, 1), (1, 64), (64, 149)):
        parts.run([], [(0, first, end)])
    parts.run([(0, 149)], [])
    for ours, theirs in (
        (whole.layer.blocks.key, parts.layer.blocks.key),
        (whole.layer.blocks.value, parts.layer.blocks.value),
    ):
        ours, theirs = ours[whole.tables[0][:9].long()], theirs[parts.tables[0][:9].long()]
        # Matrix products of other shapes may round otherwise, by one step of int8 at most.
        torch.testing.assert_close(ours, theirs, atol=1.0 if ours.dtype == torch.int8 else 1e-5, rtol=0)


@pytest.mark.parametrize("config", [AquaSettings(stored=0.5, keep=1.0), AquaSettings(keep=1.0, key_dtype="int8")])
def test_prefill_does_not_depend_on_chunks(config):
    """History and the chunk's own keys are read alike, also where they are approximate."""
    whole, parts = Requests([150], config), Requests([150], config)
    output = whole.run([], [(0, 0, 150)])
    pieces = [parts.run([], [(0, first, end)]) for first, end in ((0, 1), (1, 64), (64, 150))]
    assert relative(torch.cat(pieces), output) < 1e-3  # a step of int8 here and there
    error = relative(output, whole.dense(0, 0, 150))
    assert 1e-3 < error < 0.2


def test_decode_uses_what_was_chosen_and_nothing_else():
    """Scores and sums written out for one token, from the stored keys."""
    config = AquaSettings(keep=0.25)
    requests = Requests([63, 90], config)
    requests.run([], [(0, 0, 62), (1, 0, 89)])
    output = requests.run([(0, 62), (1, 89)], [])
    layer = requests.layer
    for r in range(2):
        query = layer.basis.project_query(requests.query[r][-1:])[0]
        key = layer.basis.project_key(requests.key[r])  # [n, KV, s]
        for h in range(6):
            kv = h // 3
            size = (query[3 * kv : 3 * kv + 3] * layer.basis.sigma[kv]).square().sum(0)
            dims = size.topk(8).indices
            scores = key[:, kv, dims] @ query[h, dims] * requests.scale
            expected = scores.softmax(0) @ requests.value[r][:, kv]
            torch.testing.assert_close(output[r, h], expected, atol=1e-5, rtol=1e-4)


def test_rules_choose_what_they_say():
    query = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 1.5]]])
    sigma = torch.tensor([[0.1, 1.0, 1.0, 1.0]])
    alone = chosen_dimensions(query, sigma, 2, "query_head")
    assert alone.tolist() == [[[True, True, False, False], [False, False, True, True]]]
    together = chosen_dimensions(query, sigma, 2, "kv_head")
    assert together.tolist() == [[[False, True, True, False]] * 2]


@pytest.mark.parametrize("choose", ["kv_head", "query_head"])
def test_error_falls_with_the_share_kept(choose):
    errors = []
    for keep in (0.25, 0.5, 0.75, 1.0):
        requests = Requests([300], AquaSettings(keep=keep, choose=choose))
        requests.run([], [(0, 0, 299)])
        errors.append(relative(requests.run([(0, 299)], []), requests.dense(0, 299, 300)))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5 and errors[-1] < 1e-5
