"""What is to be evaluated."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be evaluated.

    Attributes:
        model: `digits`, `digits@alias` or `digits:3`.
        dataset: a built-in name, or the path of a dataset.
        shown_as: what a person calls the dataset.
        compare_to: the version to compare with, if any.
        part: `train`, `validation` or `test`; the one that figures come from if None.
        leave_out_seen: whether samples that a version has seen are left out; as None, they are
            where two are compared.
        top_k: the k for which shares are wanted.
        data_root: where built-in datasets lie.
        run: the job that made the model; where its folds answered a sample that the model learned
            from, these answers count as the model's.
    """

    model: str
    dataset: str
    shown_as: str
    compare_to: str | None = None
    part: str | None = None
    leave_out_seen: bool | None = None
    top_k: tuple[int, ...] = (1, 3, 5)
    data_root: str = "data"
    run: str | None = None

    def between(self, model: str, compare_to: str | None) -> "Question":
        """The same about two versions, on what neither of them has seen."""
        return replace(self, model=model, compare_to=compare_to, leave_out_seen=True)
