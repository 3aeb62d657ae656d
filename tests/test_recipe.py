"""Recipes: schemes, presets, files, overrides, and refusals that name the key."""

from pathlib import Path

import pytest

from bitwright.errors import RecipeError
from bitwright.method import load_method, weight_spec
from bitwright.recipe import Recipe, load_recipe
from bitwright.recipes.presets import method_names
from bitwright.scheme import Scheme


@pytest.mark.parametrize("text", ["w4a16g64", "w3a16", "w8a16g128-sym", "w2a16g16-asym", "w4a8kv4g32", "w4a16kv8"])
def test_schemes_spell_themselves(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize("text", ["", "w4", "4bit", "w4a16g", "w9a16", "w1a16", "w4a16g0", "w4a16-float"])
def test_impossible_schemes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="scheme"):
        Scheme.parse(text)


def test_presets() -> None:
    assert method_names() == [
        "awq",
        "easyquant",
        "easyquant-paper",
        "gptq",
        "gptq-paper",
        "hqq",
        "omniquant",
        "omniquant+gptq",
        "omniquant+rotate",
        "omniquant+spqr",
        "omniquant-paper",
        "rotate",
        "rtn",
        "smoothquant",
        "spqr",
        "spqr-near-lossless",
        "spqr-paper",
    ]
    for name in method_names():
        assert load_method(name).name == name
        assert load_method(name).summary


def test_presets_fit_the_scheme(tmp_path: Path) -> None:
    def learn(scheme: str) -> tuple[int, bool, str]:
        method = load_recipe("omniquant-paper", scheme).method
        assert method is not None
        assert method.learn is not None
        return method.learn.epochs, method.learn.augmented, method.transform.name

    assert learn("w3a16g64") == (20, False, "none")
    assert learn("w2a16g64") == (40, True, "none")
    assert learn("w6a6") == (20, False, "smooth")
    assert load_recipe("omniquant", "w3a16g64").method.learn.epochs == 4
    assert load_recipe("omniquant", "w2a16g64").method.learn.epochs == 8
    # what a user sets comes after
    assert load_recipe("omniquant-paper", "w2a16", overrides=["learn.epochs=3"]).method.learn.epochs == 3
    path = tmp_path / "recipe.toml"
    path.write_text(
        'scheme = "w3a16"\nmethod = "rtn"\n[[rules]]\nmatch = "*"\nscheme = "w2a16"\nmethod = "omniquant-paper"\n'
    )
    assert load_recipe(file=path).rules[0].method.learn.epochs == 40


@pytest.mark.parametrize(
    "settings",
    [
        ("learn.clip=false", "learn.scales=false"),
        ("learn.clip=false",),
        ("range.name=minmax",),
    ],
)
def test_learning_without_anything_to_learn_is_refused(settings: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="nothing to learn"):
        load_recipe("omniquant-paper", "w3a16", overrides=settings)


@pytest.mark.parametrize("name", ["rtn", "easyquant", "easyquant-paper", "hqq"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tail", ["", "g16", "g128", "g64-sym", "-asym"])
def test_every_preset_takes_every_scheme(name: str, bits: int, tail: str) -> None:
    recipe = load_recipe(name, f"w{bits}a16{tail}")
    assert recipe.method is not None
    assert recipe.scheme is not None
    spec = weight_spec(recipe.method, recipe.scheme, recipe.scale_dtype)
    assert spec.bits == bits
    if tail.endswith("sym") and not tail.endswith("asym"):
        assert spec.symmetric


def test_overrides_reach_the_method_with_or_without_its_name() -> None:
    recipe = load_recipe("easyquant", "w4a16g64", overrides=["outliers.n=2.5", "method.range.updates=1", "seed=7"])
    assert recipe.method is not None
    assert recipe.method.outliers.n == 2.5  # type: ignore[union-attr]
    assert recipe.method.range.updates == 1  # type: ignore[union-attr]
    assert recipe.seed == 7
    other = load_recipe("easyquant", "w4a16g64", overrides=["outliers.name=none", "scheme=w3a16"])
    assert other.method is not None
    assert other.method.outliers.name == "none"
    assert str(other.scheme) == "w3a16"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("nonsense=1", "nonsense"),
        ("outliers.sigma=3", "sigma"),
        ("method.rnage.name=mse", "rnage"),
        ("outliers.n=-1", "outliers"),
        ("range.name=magic", "magic"),
        ("seed", "key=value"),
        ("rules=1", "rules"),
        ("seed.x=1", "seed"),
    ],
)
def test_unknown_or_impossible_overrides_are_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        load_recipe("easyquant", "w4a16g64", overrides=[override])


def test_a_file_with_rules(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        method = "easyquant"
        scheme = "w3a16g64"
        [[rules]]
        match = "*.down_proj"
        scheme = "w4a16g32"
        [[rules]]
        match = "*.layers.0.*"
        keep = true
        """
    )
    recipe = load_recipe(file=path)
    assert [rule.match for rule in recipe.rules] == ["*.down_proj", "*.layers.0.*"]
    assert str(recipe.rules[0].scheme) == "w4a16g32"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("methd = 'rtn'", "methd.*did you mean 'method'"),
        ("method = 'rnt'\nscheme = 'w4a16'", "rnt.*did you mean 'rtn'"),
        ("method = 'rtn'", "scheme is missing"),
        (
            "method = 'rtn'\nscheme = 'w4a16'\n[[rules]]\nmatch='*'\nkeep=true\nscheme='w3a16'",
            "keeps its tensors",
        ),
        ("method = 'rtn'\nscheme = 'w4a16'\n[[rules]]\nmach='*'", "rules.0.mach"),
        ("method = [", "not TOML"),
        ("", "nothing to do"),
    ],
)
def test_bad_files_are_refused_with_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=named):
        load_recipe(file=path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(file=tmp_path / "absent.toml")


def test_what_to_do_must_be_said_once() -> None:
    with pytest.raises(RecipeError, match="not both"):
        load_recipe("rtn", "w4a16", file="x.toml")
    with pytest.raises(RecipeError, match="easyquant-paper"):
        load_recipe("rtn")


def test_identity_changes_with_any_setting() -> None:
    base = load_recipe("easyquant", "w4a16g64")
    assert base.sha256() == load_recipe("easyquant", "w4a16g64").sha256()
    for override in ("seed=1", "outliers.n=2.9", "kept_dtype=source", "scheme=w4a16g32"):
        assert base.sha256() != load_recipe("easyquant", "w4a16g64", overrides=[override]).sha256()
    with pytest.raises(Exception, match="frozen"):
        base.seed = 3  # type: ignore[misc]
    assert Recipe.model_validate(base.model_dump()) == base
