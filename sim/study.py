"""An Optuna study that several processes may work on and that goes on after a kill, with reproducible draws."""

from __future__ import annotations

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

SAMPLERS = ("tpe", "nsga2")
Evaluate = Callable[["Trial"], tuple[list[float], dict[str, Any]]]  # objectives, and what to keep about the trial


def open_study(name: str, storage: str, objectives: int, sampler: str, seed: int) -> Study:
    """The study `name` in a storage: a database URL, or a journal file. All objectives are made small.

    Raises InputError without Optuna, for an unknown sampler, or for a storage that cannot be opened.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"--sampler {sampler!r}: expected {' or '.join(SAMPLERS)}")
    if importlib.util.find_spec("optuna") is None:
        raise InputError("sim tune needs Optuna: pip install 'moeflow[search]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = [optuna.study.StudyDirection.MINIMIZE] * objectives
    with _problems_of(storage):
        return optuna.create_study(
            storage=_storage(storage), study_name=name, directions=directions, load_if_exists=True,
            sampler=_by_trial(sampler, seed),
        )  # fmt: skip


@contextlib.contextmanager
def _problems_of(storage: str) -> Iterator[None]:
    """Databases and drivers raise many kinds of errors; their first line says what is wrong."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"--storage {storage}: cannot be opened ({reason}); name a file or a database such as sqlite:///tune.db"
        ) from None


def _storage(storage: str) -> str | BaseStorage:
    if "://" in storage:
        return storage
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    Path(storage).absolute().parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def _by_trial(name: str, seed: int) -> BaseSampler:
    """A sampler whose draws depend on the seed, the trial's number and earlier trials, so that no two processes, and
    no process that goes on after a kill, draw alike. TPE: Watanabe 2304.11127, multivariate, one model per branch of
    the space; NSGA-II: Deb et al. 2002."""
    from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

    def made(number: int) -> BaseSampler:
        draws = (seed * 1_000_003 + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate and group are called experimental
            if name == "nsga2":
                return NSGAIISampler(seed=draws)
            return TPESampler(seed=draws, multivariate=True, group=True, constant_liar=True)

    class ByTrial(BaseSampler):
        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            self._own = made(trial.number)
            self._own.before_trial(study, trial)

        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Any:
            return self._own.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> Any:
            return self._own.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
            return self._own.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Any) -> None:
            self._own.after_trial(study, trial, state, values)

    return ByTrial()


def search(
    study: Study, evaluate: Evaluate, trials: int, timeout_s: float | None, progress: Callable[[int, int], None]
) -> None:
    """Until the study, whoever works on it, has `trials` ended ones, or the time is up.

    A trial whose `evaluate` raises InputError cannot be: it counts as ended, with the reason as its `error`.
    """
    from optuna.trial import TrialState

    began = time.monotonic()
    while (done := len(ended(study))) < trials:
        if timeout_s is not None and time.monotonic() - began >= timeout_s:
            return
        progress(done, trials)
        trial = study.ask()
        try:
            values, kept = evaluate(trial)
        except InputError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL)
            continue
        for key, value in kept.items():
            trial.set_user_attr(key, value)
        study.tell(trial, values)
    progress(trials, trials)


def ended(study: Study) -> list[FrozenTrial]:
    """Trials that are over, whether they could be or not, in order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def complete(study: Study) -> list[FrozenTrial]:
    """Trials with figures, in order of their numbers."""
    return [trial for trial in ended(study) if trial.values is not None]
