"""Settings: a sentence each, checked all at once, named as the command line names them."""

import subprocess
import sys

import pytest

from training.config import Config, ConfigError, FinetuneConfig, TrainConfig, option_name


@pytest.mark.parametrize("kind", [TrainConfig, FinetuneConfig])
def test_every_setting_has_one_sentence(kind: type[Config]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_all_that_is_wrong_is_said_at_once_by_the_options_names() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.of(learning_rate=-1, epochs="many", optimizer="adam", colour="red")
    sentence = str(caught.value)
    assert "--lr: it should be greater than 0; it is -1" in sentence
    assert "--epochs: it should be a valid integer" in sentence
    assert "--optimizer: it should be 'sgd' or 'adamw'; it is 'adam'" in sentence
    assert "--colour is not a setting here" in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("momentum", 1.0),
        ("label_smoothing", -0.1),
        ("learning_rate", float("nan")),
        ("weight_decay", float("inf")),
        ("validation_fraction", 1.0),
        ("augment", "wild"),
        ("seed", -1),
        ("unfreeze_factor", 0.5),
    ],
)
def test_ranges_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option_name(name)):
        FinetuneConfig.of(**{name: value})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_settings_import_no_torch() -> None:
    code = "import sys, training.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"
