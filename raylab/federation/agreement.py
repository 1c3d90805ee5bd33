"""The agreement: which sites train which recipe together, with which keys and how. Every site signs it.

In the exchange directory, `agreement.json` is the agreement and `signatures/SITE.json` what each site has signed. It is
identified by the SHA-256 of its content, which is part of every message: nothing of another agreement is accepted.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raylab.config.overrides import override
from raylab.config.recipe import NetworkModel, Recipe
from raylab.documents import Document, read_document
from raylab.errors import DataError, UsageError, unknown
from raylab.federation import privacy as budgets
from raylab.federation.keys import Identity, PrivateKeys
from raylab.federation.privacy import Privacy
from raylab.files import write_json
from raylab.tasks import find_task
from raylab.tasks.recipes import parse_recipe

FILE = "agreement.json"
SIGNATURES = "signatures"
LEAST_SITES = 2
PRIVATE_SITES = 3  # of two sites, each gets the other's values by subtracting its own

DEFAULT_BOUND = 16.0  # norm of the gradient of a shard's mean loss

CpuCapability = Literal["default", "avx2", "avx512"]
"""vector instructions, as torch's ATEN_CPU_CAPABILITY names them"""
LocalSteps = Annotated[int, Field(ge=1)] | Literal["epoch"]
"""steps that a site takes alone between two averages"""


class Site(Identity):
    """A site and its part of every step."""

    rows: int = Field(ge=1)
    """rows of a step"""
    shards: int = Field(ge=1)
    """logical shards into which these are cut"""

    @model_validator(mode="after")
    def _shards_fit(self) -> Self:
        if self.shards > self.rows:
            raise ValueError(f"{self.shards} shards of {self.rows} rows")
        return self


class Agreement(BaseModel):
    """What the sites agree on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = 3
    id: str
    """random, so that no two agreements have the same masks"""
    local_steps: LocalSteps | None
    """None for exact sums, where a step is one of all sites; otherwise the sites average their weights after so many
    steps of their own, and at the end of each epoch"""
    recipe: dict[str, Any]
    sites: tuple[Site, ...]
    gradient_bound: float | None = Field(gt=0)
    """exact: largest norm of the gradient of a shard's mean loss; a larger one is scaled down"""
    cpu_capability: CpuCapability
    """vector instructions that every site is limited to"""
    patience_seconds: float = Field(gt=0)
    """time without a site's message after which the others go on without it, or end, if they have a privacy budget"""
    privacy: Privacy | None
    """None: no noise; otherwise each row is a shard, and every sum of values has noise of all sites"""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if (self.gradient_bound is None) != (self.local_steps is not None):
            raise ValueError("exact sums need a gradient_bound, and averages have none")
        return self

    @model_validator(mode="after")
    def _bounds_every_row(self) -> Self:
        if self.privacy is None:
            return self
        if self.local_steps is not None or any(site.rows != site.shards for site in self.sites):
            raise ValueError("a privacy budget needs exact sums with a shard for each row")
        if self.privacy.colluding_sites >= len(self.sites):
            raise ValueError(f"{self.privacy.colluding_sites} of {len(self.sites)} sites collude: one is left at most")
        return self

    @property
    def sha256(self) -> str:
        """SHA-256 of the agreement."""
        return hashlib.sha256(self._content()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all sites, in the order of their shards."""
        return tuple(site.site for site in self.sites)

    def parse_recipe(self) -> Recipe:
        """Return the recipe; UsageError if this version of raylab does not know it."""
        return parse_recipe(self.recipe)

    def find(self, name: str) -> Site:
        """Return the site with this name; UsageError with similar names if there is none."""
        for site in self.sites:
            if site.site == name:
                return site
        raise unknown("site", name, self.names)

    def _content(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def signed_content(self) -> bytes:
        """What a site signs."""
        return b"raylab agreement\n" + self.sha256.encode()


class Signature(Document):
    """One site's signature of an agreement."""

    site: str
    agreement: str
    signature: str


def propose(
    recipe: Recipe,
    identities: Sequence[Identity],
    rows: Sequence[int],
    shards: Sequence[int],
    gradient_bound: float | None,
    cpu_capability: CpuCapability,
    patience_seconds: float,
    local_steps: LocalSteps | None = None,
    privacy: Privacy | None = None,
) -> Agreement:
    """Return an agreement to train `recipe` with `rows` and `shards` of each site in a step.

    The recipe's batch and shards become the sums of those. With `local_steps` the sites average their weights
    (McMahan et al., arXiv 1602.05629); otherwise all steps are exact sums, with a default bound unless `gradient_bound`
    is given; and with `privacy` they have noise, and each row must be a shard. Raises UsageError for a recipe that
    cannot be trained so.
    """
    names = [identity.site for identity in identities]
    if len(names) < LEAST_SITES or len(set(names)) < len(names):
        raise UsageError(f"an agreement needs {LEAST_SITES} sites or more with different names, got {', '.join(names)}")
    if len(rows) != len(names) or len(shards) != len(names):
        raise UsageError(
            f"{len(names)} sites need {len(names)} numbers of rows and of shards, got {len(rows)} and {len(shards)}"
        )
    if wrong := [name for name, n, cut in zip(names, rows, shards, strict=True) if not 1 <= cut <= n]:
        raise UsageError(
            f"site {wrong[0]} has more shards than rows in a step", do="give it more rows, or fewer shards"
        )
    settings = {"loop.global_batch_size": sum(rows), "loop.shards": sum(shards), "scaling.workers": 0}
    recipe = override(recipe, settings)
    check_recipe(recipe)
    if privacy is not None:
        check_private(recipe, rows, shards, local_steps, privacy)
    if local_steps is None:
        default = DEFAULT_BOUND if privacy is None else budgets.DEFAULT_BOUND
        gradient_bound = default if gradient_bound is None else gradient_bound
    elif gradient_bound is not None:
        raise UsageError(
            "a gradient bound is for exact sums; sites that average their weights send no gradients",
            do="leave out --gradient-bound, or --local-steps",
        )
    elif local_steps != "epoch" and local_steps < 1:
        raise UsageError(f"sites take 1 local step or more, got {local_steps}")
    for name, value in (("gradient bound", gradient_bound), ("patience", patience_seconds)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"the {name} must be a number above 0, got {value:g}")
    sites = (
        Site(**identity.model_dump(), rows=n, shards=cut)
        for identity, n, cut in zip(identities, rows, shards, strict=True)
    )
    return Agreement(
        id=secrets.token_hex(16),
        local_steps=local_steps,
        recipe=recipe.model_dump(mode="json"),
        sites=tuple(sites),
        gradient_bound=gradient_bound,
        cpu_capability=cpu_capability,
        patience_seconds=patience_seconds,
        privacy=privacy,
    )


def check_private(
    recipe: Recipe, rows: Sequence[int], shards: Sequence[int], local_steps: LocalSteps | None, privacy: Privacy
) -> None:
    """Raise UsageError, with the reason, for an agreement that cannot have a privacy budget."""
    statistics = find_task(recipe.task).site_statistics
    reasons = {
        "weights that are averaged have no bound on what one patient changes": local_steps is not None,
        "the gradient of each row is limited by itself, so every row is a shard": list(rows) != list(shards),
        f"{privacy.colluding_sites} of {len(rows)} sites may collude, and the noise of the others must hide the rest": (
            privacy.colluding_sites >= len(rows)
        ),
        f"the statistics of the inputs of task '{recipe.task}' are not sums over patients": (
            statistics is None or statistics.add_up_patients is None
        ),
        "optim.logit_adjustment needs the number of rows of each class, which is not sent": (
            recipe.optim.logit_adjustment != 0
        ),
    }
    if found := [why for why, holds in reasons.items() if holds]:
        raise UsageError("this agreement cannot have a privacy budget", "; ".join(found), "change it, or leave it out")


def check_recipe(recipe: Recipe) -> None:
    """Raise UsageError, with the reason, for a recipe whose results are not sums over sites."""
    reasons = {
        "it trains on a GPU, where sums are not equal to the bit": recipe.scaling.gpu,
        f"the model '{recipe.model.name}' is fitted at once, without steps": not isinstance(recipe.model, NetworkModel),
        "its weights begin from a file, which every site would have to have": recipe.model.weights_path is not None,
        "data.class_fraction selects rows by the classes of all sites": recipe.data.class_fraction is not None,
        f"the statistics of the inputs of task '{recipe.task}' are not formed from sums": (
            find_task(recipe.task).site_statistics is None
        ),
    }
    if found := [why for why, holds in reasons.items() if holds]:
        raise UsageError("this recipe cannot be trained by several sites", "; ".join(found), "change it with --set")


def write_agreement(agreement: Agreement, exchange: Path) -> Path:
    """Write a new agreement into the exchange directory; UsageError if that has one."""
    path = exchange / FILE
    if path.exists():
        raise UsageError(f"{path} exists already", "each agreement has a directory of its own", "choose another one")
    exchange.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(path, agreement.model_dump(mode="json"))
    share(path)
    return path


def share(path: Path) -> None:
    """Let those read a file of the exchange who may read its directory; it is private otherwise."""
    path.chmod(0o600 | (path.parent.stat().st_mode & 0o044))


def read_agreement(exchange: Path) -> Agreement:
    """Read the agreement of an exchange directory, whether signed or not; DataError if it is damaged."""
    path = exchange / FILE
    document = read_document(path, Document, "raylab federate agree ... --exchange DIR writes it").to_json()
    try:
        return Agreement.model_validate(document)
    except ValueError as error:
        raise DataError(f"{path} is not an agreement of this version of raylab", str(error).split("\n")[0]) from error


def sign(agreement: Agreement, keys: PrivateKeys, exchange: Path) -> Path:
    """Write the signature of the site of `keys`; DataError unless the agreement has the site with these keys."""
    if keys.identity() != Identity(**agreement.find(keys.site).model_dump(include=set(Identity.model_fields))):
        raise DataError(
            f"the agreement has other keys for site '{keys.site}' than the key file",
            "the agreement was made with an older or a foreign key",
            "make the agreement again with the site's present SITE.public.json",
        )
    path = exchange / SIGNATURES / f"{keys.site}.json"
    if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)
        path.parent.chmod(exchange.stat().st_mode & 0o7777)
    signature = keys.sign(agreement.signed_content).hex()
    write_json(path, {"site": keys.site, "agreement": agreement.sha256, "signature": signature})
    share(path)
    return path


def find_unsigned(agreement: Agreement, exchange: Path) -> list[str]:
    """Return the sites whose signature is not there yet; DataError, with the reason, for one that is wrong."""
    missing = []
    for site in agreement.sites:
        path = exchange / SIGNATURES / f"{site.site}.json"
        if not path.exists():
            missing.append(site.site)
            continue
        found = read_document(path, Signature, f"the site signs again: raylab federate sign --exchange {exchange}")
        if found.agreement != agreement.sha256:
            raise DataError(
                f"site '{site.site}' has signed another agreement than {exchange / FILE}",
                "the agreement was changed after the site had signed it",
                "restore it, or let every site sign the present one",
            )
        try:
            is_valid = found.site == site.site and site.is_signed(
                bytes.fromhex(found.signature), agreement.signed_content
            )
        except ValueError:
            is_valid = False
        if not is_valid:
            raise DataError(
                f"the signature of site '{site.site}' in {path} is forged or damaged",
                "it does not fit the site's key in the agreement",
                f"the site signs again: raylab federate sign --exchange {exchange}",
            )
    return missing
