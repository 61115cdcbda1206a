"""Tokens that an adapter adds to the base's vocabulary."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB
from peft import AdaLoraConfig, LoraConfig, TrainableTokensConfig, get_peft_model
from peft_folders import base_of, edit_tensors, key_of, relative, save
from safetensors.torch import load_file
from tenants import form_of
from transformers import DynamicCache

from lorakit import AdapterBank, MultiLoraModel, export
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.layout import Extent
from lorakit.errors import AdapterIdsError, BankError, BaseModelMismatchError, UnsupportedMethodError
from lorakit.runtime.roster import Local

ADDED = 3
NEW = list(range(VOCAB, VOCAB + ADDED))


def resized(config, name="llama", seed=0, added=ADDED):
    """An adapter of this configuration on the base with more tokens; what training changes is random, and what is new.

    Args:
        config: PEFT's.
        name: of the architecture.
        seed: of the parameters.
        added: tokens.
    """
    base = copy.deepcopy(base_of(name))
    base.resize_token_embeddings(VOCAB + added, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in filter(None, (base.get_input_embeddings(), base.get_output_embeddings())):
            layer.weight[VOCAB:] = 0.2 * torch.randn(layer.weight[VOCAB:].shape, generator=generator)
        model = get_peft_model(base, config).eval()
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def lora(*targets, **options):
    return LoraConfig(target_modules=["q_proj", *targets], r=4, **options)


EMBEDDINGS = ("embed_tokens", "lm_head")
TRAINED = {"save_embedding_layers": False}  # PEFT's default where the base has no configuration on a disk
TENANTS = {
    "whole beside lora": ("llama", lora(), {}),
    "whole beside lora, tied": ("llama-tied", lora(), {}),
    "whole, of a scaled embedding and capped logits": ("gemma3", lora(), {}),
    "saved modules": ("llama", lora(modules_to_save=list(EMBEDDINGS)), TRAINED),
    "saved modules, tied": ("llama-tied", lora(modules_to_save=list(EMBEDDINGS)), TRAINED),
    "saved embedding": ("llama", lora(modules_to_save=["embed_tokens"]), TRAINED),
    "adapted": ("llama", lora(*EMBEDDINGS), {}),
    "adapted, tied": ("llama-tied", lora(*EMBEDDINGS), {}),
    "adapted, scaled": ("gemma3", lora("embed_tokens"), {}),
    "adapted by dora": ("llama", lora(*EMBEDDINGS, use_dora=True), {}),
    "adapted by rslora": ("llama-tied", lora("lm_head", use_rslora=True), {}),
    "whole, of GPT-2": ("gpt2", LoraConfig(target_modules=["c_attn", "wte"]), {}),
    "whole, of an encoder-decoder": ("t5", LoraConfig(target_modules=["q"]), {}),
    "saved, of an encoder-decoder": (
        "t5",
        LoraConfig(target_modules=["q"], modules_to_save=["embed_tokens", "lm_head"]),
        TRAINED,
    ),
    "whole, of a classifier": ("bert", LoraConfig(target_modules=["query"]), {}),
    "beside adalora": ("llama", AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4), {}),
    "trained tokens": ("llama-tied", lora(trainable_token_indices=NEW), TRAINED),
    "trained tokens, of a scaled embedding": ("gemma3", lora(trainable_token_indices=NEW), TRAINED),
    "trained tokens, old and new": ("llama-tied", lora(trainable_token_indices=[5, *NEW]), TRAINED),
    "trained tokens and whole": ("llama-tied", lora(trainable_token_indices=[5, *NEW[1:]]), {}),
    "trained tokens and whole, untied": ("llama", lora(trainable_token_indices=[5, *NEW[1:]]), {}),
    "trained tokens alone": ("llama-tied", TrainableTokensConfig(token_indices=[5, *NEW]), TRAINED),
    "trained tokens alone, and whole": ("llama-tied", TrainableTokensConfig(token_indices=[5, *NEW]), {}),
}


def folder_of(config, name, folder, seed=0, added=ADDED, **options):
    tenant = resized(config, name, seed, added)
    return tenant, save(tenant, folder, **{"save_embedding_layers": True, **options})


@pytest.mark.parametrize("name", TENANTS)
@torch.no_grad()
def test_added_tokens_are_exact(name, tmp_path):
    architecture, config, options = TENANTS[name]
    tenant, folder = folder_of(config, architecture, tmp_path / "a", **options)
    base = base_of(architecture)
    bank = export({"a": folder}, tmp_path / "bank", base_model=base)
    model = MultiLoraModel(copy.deepcopy(base), AdapterBank.open(bank.path))
    inputs = ARCHITECTURES[architecture].inputs(2)
    for ids in inputs.values():
        ids[0, :3] = torch.tensor([*NEW[1:], 5])
    row, other = ({key: ids[at : at + 1] for key, ids in inputs.items()} for at in (0, 1))
    exact = copy.deepcopy(tenant).double()(**row).logits[0]
    mixed = model(**inputs, adapter_ids=["a", None]).logits
    width, plain = mixed.shape[-1], base(**other).logits[0]
    own = plain.shape[-1]
    assert width == (own if name in ("saved embedding", "whole, of a classifier") else VOCAB + ADDED)
    assert relative(mixed[0], exact[..., :width]) <= 2e-5
    assert relative(mixed[1, ..., :own], plain) <= 1e-6
    assert (mixed[1, ..., own:] == -torch.inf).all()
    assert relative(model(**row, adapter_ids="a").logits[0], exact[..., :width]) <= 2e-5
    stored = load_file(folder / "adapter_model.safetensors")
    given = load_file(bank.export_peft("a", tmp_path / "out", base_model=base) / "adapter_model.safetensors")
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)


def test_rows_of_the_base_are_not_kept_again(tmp_path):
    for name in ("whole beside lora", "adapted", "trained tokens"):
        architecture, config, options = TENANTS[name]
        form = form_of(folder_of(config, architecture, tmp_path / name, **options)[1], architecture)
        for path in ("model.embed_tokens", "lm_head"):
            module = form.modules[path]
            assert module.w is None and module.added == ADDED
        assert sum(extra.numel() for extra in form.extras.values()) < VOCAB * 32


@torch.no_grad()
def test_one_batch_holds_tokens_of_several_tenants(tmp_path):
    base = base_of("llama-tied")
    configs = {
        "three": (lora(), ADDED),
        "five": (lora(*EMBEDDINGS), 5),
        "saved": (lora(modules_to_save=list(EMBEDDINGS)), ADDED),
        "tokens": (lora(trainable_token_indices=[5, *range(VOCAB, VOCAB + 5)]), 5),
        "plain": (lora("embed_tokens"), 0),
    }
    tenants, folders = {}, {}
    for seed, (name, (config, added)) in enumerate(configs.items()):
        whole = added > 0 and name in ("three", "five")
        tenants[name], folders[name] = folder_of(
            config, "llama-tied", tmp_path / name, seed, added, save_embedding_layers=whole
        )
    bank = export(folders, tmp_path / "bank", base_model=base)
    model = MultiLoraModel(copy.deepcopy(base), AdapterBank.open(bank.path))
    names = ["three", None, "five", "plain", "saved", "tokens", "three", None]
    ids = torch.randint(3, VOCAB, (len(names), 7), generator=torch.Generator().manual_seed(0))
    for row, name in enumerate(names):
        if name and configs[name][1]:
            ids[row, 2:4] = VOCAB + torch.tensor([0, configs[name][1] - 1])
    mixed = model(ids, adapter_ids=names).logits
    assert mixed.shape[-1] == VOCAB + 5
    for row, name in enumerate(names):
        expected = (tenants[name] if name else base)(ids[row : row + 1]).logits[0]
        assert relative(mixed[row, :, : expected.shape[-1]], expected) <= 1e-5
        assert (mixed[row, :, expected.shape[-1] :] == -torch.inf).all()
    plain = model(ids[[1, 3]], adapter_ids=[None, "plain"]).logits
    assert plain.shape[-1] == VOCAB


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 3.0}])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_every_row_generates_its_own_tokens(options, name, tmp_path):
    base = base_of(name)
    tenant, folder = folder_of(lora(), name, tmp_path / "a")
    other = resized(lora(), name, 1, 5)
    with torch.no_grad():  # the new tokens are likely ones
        for model in (tenant, other):
            model.get_output_embeddings().weight[VOCAB:].mul_(8)
    folders = {"a": save(tenant, tmp_path / "a", save_embedding_layers=True)}
    folders["b"] = save(other, tmp_path / "b", save_embedding_layers=True)
    model = MultiLoraModel(copy.deepcopy(base))
    for key, folder in folders.items():
        model.load_adapter(key, folder)
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    mixed = model.generate(ids, adapter_ids=["a", "b", None], **settings)[:, 5:]
    assert (mixed[0] < VOCAB + ADDED).all() and (mixed[1] < VOCAB + 5).all() and (mixed[2] < VOCAB).all()
    assert (mixed[:2] >= VOCAB).any()
    if "do_sample" not in options:
        for row, expected in enumerate((tenant, other, base)):
            alone = expected.generate(input_ids=ids[row : row + 1], **settings)[0, 5:]
            assert torch.equal(mixed[row], alone)


@torch.no_grad()
def test_capped_logits_are_masked_again(tmp_path):
    tenant, folder = folder_of(lora(), "gemma3", tmp_path / "a")
    base = copy.deepcopy(base_of("gemma3"))
    tenant.config.final_logit_softcapping = base.config.final_logit_softcapping = 3.0
    model = MultiLoraModel(base)
    model.load_adapter("a", folder)
    ids = torch.tensor([[5, VOCAB + 2, 6], [5, 6, 7]])
    mixed, plain = model(ids, adapter_ids=["a", None]).logits, base(ids[1:]).logits[0]
    assert relative(mixed[0], tenant(ids[:1]).logits[0]) <= 1e-5
    assert relative(mixed[1, :, :VOCAB], plain) <= 1e-6 and plain.abs().max() < 3
    assert (mixed[1, :, VOCAB:] == -torch.inf).all()


def test_ids_that_are_no_rows_own_are_refused(tmp_path):
    model = MultiLoraModel(copy.deepcopy(base_of()))
    model.load_adapter("a", folder_of(lora(), "llama", tmp_path / "a")[1])
    ids = torch.tensor([[5, VOCAB + 2], [5, 6]])
    model(ids, adapter_ids=["a", None])
    with pytest.raises(AdapterIdsError, match=f"row 1 has the token {VOCAB + 2}"):
        model(ids.flip(0), adapter_ids=["a", None])
    with pytest.raises(AdapterIdsError, match=f"row 0 has the token {VOCAB + 3}"):
        model.generate(ids + torch.tensor([[0, 1], [0, 0]]), adapter_ids=["a", None])
    with pytest.raises(AdapterIdsError, match="labels"):
        model(ids, labels=ids, adapter_ids=["a", None])


@torch.no_grad()
def test_added_ids_before_the_adapter_acts_are_refused(tmp_path):
    model = MultiLoraModel(copy.deepcopy(base_of()))
    invoked = lora(alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM")
    tenant, folder = folder_of(invoked, "llama", tmp_path / "a")
    model.load_adapter("a", folder)
    model.load_adapter("other", folder_of(lora(), "llama", tmp_path / "other")[1])
    new = VOCAB + 2
    acts, early, never = [5, 7, 8, new, 6], [new, 7, 8, 5, 6], [5, 6, 7, new, 8]
    generating = {"max_new_tokens": 2, "do_sample": False}
    expected = tenant(torch.tensor([acts]), alora_offsets=[4]).logits[0]
    assert relative(model(torch.tensor([acts]), adapter_ids="a").logits[0, 1:], expected[1:]) <= 1e-5
    for wrong in (early, never):
        for rows, names in (([wrong], "a"), ([acts, wrong], ["a", "a"]), ([never, wrong], ["other", "a"])):
            ids = torch.tensor(rows)
            for call in (model, lambda ids, **options: model.generate(ids, **options, **generating)):
                with pytest.raises(AdapterIdsError, match=f"row {len(rows) - 1} .* {new}, .*adds.*invocation tokens"):
                    call(ids, adapter_ids=names)
    # What continues a cache is told apart by its place in the whole text.
    cache = DynamicCache(config=model.config)
    whole = model(torch.tensor([acts]), adapter_ids="a").logits[0, -2:]
    model(torch.tensor([acts[:3]]), adapter_ids="a", past_key_values=cache)
    with pytest.raises(AdapterIdsError, match=f"row 0 .* {new}, .*adds"):
        model(torch.tensor([acts[3:]]), adapter_ids="a", past_key_values=copy.deepcopy(cache), alora_offsets=[1])
    rest = model(torch.tensor([acts[3:]]), adapter_ids="a", past_key_values=cache, alora_offsets=[4]).logits[0]
    assert relative(rest, whole) <= 1e-5
    # Nobody's tokens are looked up where the adapter that has them does not act: a loss is the base's.
    plain = torch.tensor([[5, 6, 9, 4]])
    assert model(plain, labels=plain, adapter_ids="a").loss == model(plain, labels=plain, adapter_ids=None).loss


@torch.no_grad()
def test_a_compiled_base_serves_them(tmp_path):
    base = copy.deepcopy(base_of("gemma3"))
    base.config.final_logit_softcapping = 3.0
    model = MultiLoraModel(base)
    model.load_adapter("a", folder_of(lora("embed_tokens"), "gemma3", tmp_path / "a")[1])
    ids = torch.tensor([[5, VOCAB + 2, 6], [5, 6, 7]])
    before = model(ids, adapter_ids=["a", None]).logits
    base.compile(backend="eager", fullgraph=True)
    assert torch.equal(model(ids, adapter_ids=["a", None]).logits, before)
    assert model(ids[1:], adapter_ids=[None]).logits.shape[-1] == VOCAB


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_serve_them_beside_others(dtype, tmp_path):
    model = MultiLoraModel(copy.deepcopy(base_of("llama-tied")).to(dtype).cuda())
    tenants = {"a": resized(lora(*EMBEDDINGS), "llama-tied"), "b": resized(lora(), "llama-tied", 1, 5)}
    for name, tenant in tenants.items():
        model.load_adapter(name, save(tenant, tmp_path / name, save_embedding_layers=True))
    ids = torch.tensor([[5, VOCAB + 2, 6], [5, 6, 7], [VOCAB, VOCAB + 4, 7], [5, VOCAB, 6]])
    names = ["a", None, "b", "a"]
    for _ in range(2):  # the second time siblings are known
        mixed = model(ids.cuda(), adapter_ids=names).logits.cpu()
        for row, name in enumerate(names):
            expected = (tenants[name] if name else base_of("llama-tied"))(ids[row : row + 1]).logits[0]
            error = relative(mixed[row, :, : expected.shape[-1]], expected)
            assert error <= (1e-5 if dtype == torch.float32 else 2e-2)
            assert (mixed[row, :, expected.shape[-1] :] == -torch.inf).all()


@torch.no_grad()
def test_a_bank_that_adds_tokens_elsewhere_is_refused():
    model = MultiLoraModel(copy.deepcopy(base_of()))
    path = "model.layers.0.self_attn.q_proj"
    form = AdapterForm("lora", {path: ModuleForm("linear", 32, 32, t=torch.zeros(2, 32))}, {})
    model._roster.add("a", Local("local-a", Extent.of_form(form), None))
    with pytest.raises(BankError, match="no output layer"):
        model(torch.tensor([[5, 6]]), adapter_ids="a")


@torch.no_grad()
def test_a_narrow_adapter_is_given_back_as_it_was(tmp_path):
    folder = folder_of(lora("embed_tokens"), "llama-tied", tmp_path / "a")[1]
    edit_tensors(folder, lambda tensors: tensors.update({key: t.bfloat16() for key, t in tensors.items()}))
    bank = export({"a": folder}, tmp_path / "bank", base_model=base_of("llama-tied"))
    stored = load_file(folder / "adapter_model.safetensors")
    given = load_file(
        bank.export_peft("a", tmp_path / "out", base_model=base_of("llama-tied")) / "adapter_model.safetensors"
    )
    assert given.keys() == stored.keys()
    assert all(given[key].dtype == torch.bfloat16 and torch.equal(given[key], stored[key]) for key in stored)


def test_a_sum_of_such_adapters_is_refused(tmp_path):
    folders = {"a": folder_of(lora(*EMBEDDINGS), "llama", tmp_path / "a")[1]}
    bank = export(folders, tmp_path / "bank", base_model=base_of())
    with pytest.raises(UnsupportedMethodError, match="adds tokens to the vocabulary"):
        bank.merge("b", {"a": 0.5})


@torch.no_grad()
def test_nan_of_one_tenant_reaches_no_other_row(tmp_path):
    model = MultiLoraModel(copy.deepcopy(base_of()))
    model.load_adapter("a", folder_of(lora(), "llama", tmp_path / "a")[1])
    model.load_adapter("b", folder_of(lora(), "llama", tmp_path / "b", 1, 5)[1])
    ids = torch.tensor([[5, VOCAB + 2], [VOCAB, VOCAB + 1], [5, 6]])
    before = model(ids, adapter_ids=["a", "b", None]).logits
    rows = model._adapted.last.batches[0].added._rows
    for each in rows.values():
        each.table[0].fill_(torch.nan)
    after = model(ids, adapter_ids=["a", "b", None]).logits
    assert after[0].isnan().any() and torch.equal(after[1:], before[1:])


REFUSED = {
    "tokens whose rows are not there": (
        "save_embedding_layers",
        lora(trainable_token_indices=[VOCAB, VOCAB + 2]),
        False,
        None,
    ),
    "an adapter on another base's rows": (
        "differs from the base's",
        lora(*EMBEDDINGS),
        True,
        lambda t: t[key_of(t, "embed_tokens.base_layer")][7].add_(1),
    ),
    "a bias of added tokens": ("bias", lora("lm_head", lora_bias=True), True, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused(name, tmp_path):
    match, config, whole, change = REFUSED[name]
    folder = folder_of(config, "llama", tmp_path / "a", save_embedding_layers=whole)[1]
    if change:
        edit_tensors(folder, change)
    with pytest.raises(UnsupportedMethodError, match=match):
        form_of(folder)


@torch.no_grad()
def test_rows_that_training_changed_before_are_the_adapters_own(tmp_path):
    tenant, folder = folder_of(lora(), "llama", tmp_path / "a")
    tenant.get_input_embeddings().weight[5].add_(1)
    save(tenant, folder, save_embedding_layers=True)
    form = form_of(folder)
    assert form.modules["model.embed_tokens"].w is not None and form.modules["lm_head"].w is None
    model = MultiLoraModel(copy.deepcopy(base_of()))
    model.load_adapter("a", folder)
    ids = torch.tensor([[5, VOCAB + 2, 6]])
    assert relative(model(ids, adapter_ids="a").logits, tenant(ids).logits) <= 1e-5


def test_a_checkpoint_is_given_back_with_its_own_bases_rows_only(tmp_path):
    bank = export({"a": folder_of(lora(), "llama", tmp_path / "a")[1]}, tmp_path / "bank", base_model=base_of())
    with pytest.raises(BaseModelMismatchError):
        bank.export_peft("a", tmp_path / "out", base_model=base_of("qwen3"))
