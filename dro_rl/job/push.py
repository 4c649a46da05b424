"""A run's trained models to a hub, when somebody asks for it. Nothing else in the package writes to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, LackError, Phrase, first_line
from dro_rl.job.cards import write_cards
from dro_rl.roles import Role


@dataclass(frozen=True)
class Push:
    """A folder and where it goes.

    Args:
        role: of the model.
        folder: with its files.
        repository: `owner/name`.
        files: bytes of each file that goes there, by its path.
    """

    role: Role
    folder: Path
    repository: str
    files: Mapping[str, int]


def plan_push(run: Path, repositories: Mapping[Role, str]) -> list[Push]:
    """What would go where. The cards are written anew, so that they say what is known by now.

    Args:
        run: a run's folder.
        repositories: by role; a role that is not named stays here.

    Raises:
        InputError: no repository, or a name that is none; one for both models; a role that the run has not exported.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not repositories:
        raise InputError(
            "push", Phrase("no repository"), "a model goes to a repository", "Add --repo-selector or --repo-generator."
        )
    for role, name in repositories.items():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"--repo-{role}", name, first_line(error), "Name it owner/name.") from None
        if name.count("/") != 1:
            raise InputError(f"--repo-{role}", name, "a repository is owner/name", "Name its owner too.")
    if len(set(repositories.values())) < len(repositories):
        raise InputError(
            "--repo-generator", repositories["generator"], "each model has a repository of its own", "Name another."
        )
    exported = {card.parent.name for card in write_cards(run)}
    plans = []
    for role, name in repositories.items():
        folder = run / role
        if role not in exported:
            raise InputError(f"--repo-{role}", name, f"{run} has exported this role", f"Leave --repo-{role} out.")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        plans.append(Push(role, folder, name, {name: size for name, size in files.items() if _goes(name)}))
    return plans


def check_token() -> None:
    """Raise `LackError` where nobody has logged in."""
    from huggingface_hub import get_token

    if not get_token():
        raise LackError(
            "push", Phrase("no token"), "a hub is written to under a token", "Log in: hf auth login, or set HF_TOKEN."
        )


def push(plan: Push, *, public: bool) -> str:
    """Create the repository where there is none, and upload the files in one commit. Returns its address.

    Args:
        plan: of `plan_push`.
        public: of a new repository; one that is there has to be so already, or not.

    Raises:
        InputError: it is public and was not asked to be; or the hub refuses.
        LackError: no token; the hub is out of reach.
    """
    from huggingface_hub import HfApi

    check_token()
    api = HfApi()
    _asked(plan, lambda: api.create_repo(plan.repository, private=not public, exist_ok=True))
    about = _asked(plan, lambda: api.model_info(plan.repository))
    if not about.private and not public:
        raise InputError(
            f"--repo-{plan.role}", plan.repository, "what is pushed is private, and this is public", "Add --public."
        )
    done = _asked(
        plan,
        lambda: api.upload_folder(
            repo_id=plan.repository,
            folder_path=plan.folder,
            allow_patterns=list(plan.files),
            commit_message=f"{plan.role} of a run of dro_rl",
        ),
    )
    return str(done.commit_url)


def _goes(name: str) -> bool:
    """Not what is hidden, and not the page that PEFT writes beside adapters, which knows this machine's paths."""
    return not any(part.startswith(".") for part in Path(name).parts) and name != "adapter/README.md"


def _asked(plan: Push, ask: Callable[[], Any]) -> Any:
    """What the hub answers; a refusal and a hub out of reach in one line."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    place = f"--repo-{plan.role}"
    try:
        return ask()
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise LackError(
            place,
            Phrase(f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"),
            f"{plan.repository} is there",
            "Connect, or name another hub in HF_ENDPOINT.",
        ) from None
    except HfHubHTTPError as error:
        raise InputError(
            place, plan.repository, f"the hub takes it ({first_line(error)})", "Check the name and the token's rights."
        ) from None
