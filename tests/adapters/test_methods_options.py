"""What every family's options are held to."""

import pytest
from peft import HRAConfig, PveraConfig, TinyLoraConfig, UniLoraConfig, VeraConfig
from peft_folders import save
from tenants import form_of, tenant_with

from lorakit.adapters.methods import options
from lorakit.errors import CheckpointError

TARGETS = {"target_modules": ["q_proj"]}
BOUNDLESS = {
    "vera": VeraConfig(r=4, save_projection=False, **TARGETS),
    "pvera": PveraConfig(r=4, save_projection=False, **TARGETS),
    "tinylora": TinyLoraConfig(r=2, u=3, save_projection=False, **TARGETS),
    "unilora": UniLoraConfig(r=4, theta_d_length=64, save_indices=False, **TARGETS),
    "hra": HRAConfig(r=4, **TARGETS),
}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("method", BOUNDLESS)
def test_what_no_tensor_bounds_may_not_take_all_memory(tmp_path, method, monkeypatch):
    folder = save(tenant_with(BOUNDLESS[method]), tmp_path / "tenant")
    assert form_of(folder).modules
    monkeypatch.setattr(options, "MOST_ELEMENTS", 11)
    with pytest.raises(CheckpointError, match=r"tenant: (r|u)=\d asks for .* numbers, more than the 11"):
        form_of(folder)
