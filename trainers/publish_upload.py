"""The last step: a planned folder -> a repository on the Hub, which keeps whatever else lies there."""

from pathlib import Path

from huggingface_hub import HfApi

from trainers.publish_card import MARK
from trainers.publish_files import CARD, UploadPlan


def upload(plan: UploadPlan, repo_id: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Creates `repo_id` where it does not exist (an existing one keeps its visibility), sends the plan's files and
    returns the address of the last commit.

    Files that are already there and not in the plan stay. A card that people have edited (see publish_card.MARK) stays
    too. Started again after an interruption, it sends what is not there yet.
    """
    api = HfApi(endpoint=endpoint)
    api.create_repo(repo_id, private=private, exist_ok=True)
    files = list(plan.files)
    if CARD in files and _has_a_card_of_its_own(api, repo_id):
        files.remove(CARD)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=plan.folder, allow_patterns=files, commit_message="Upload with qwenvl"
    )
    return str(commit)


def _has_a_card_of_its_own(api: HfApi, repo_id: str) -> bool:
    if not api.file_exists(repo_id, CARD):
        return False
    path = api.hf_hub_download(repo_id, CARD, force_download=True)
    return MARK not in Path(path).read_text(encoding="utf-8")
