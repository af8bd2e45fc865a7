//! Long jobs: the work runs on a thread of its own, and the calling thread waits detached in short
//! steps, looks for signals, and reports progress. Workers call Python only to read a
//! pickle or a module's tensor.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::prelude::*;

use lorafast::parallel::task::Task;

use crate::errors::to_python;

/// What is noted on an interruption that came too late.
const FINISHED: &str = "what was asked for was finished before that";
/// How often signals and progress are looked at.
const STEP: Duration = Duration::from_millis(50);

/// Runs `work` to its end. A signal's exception or one from `progress` cancels it and is raised.
/// `progress` is called with what is done and what there is to do.
pub fn run<T: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&Task) -> lorafast::Result<T> + Send,
) -> PyResult<T> {
    let report = |py: Python<'_>, task: &Task| match (&progress, task.progress()) {
        (Some(progress), (done, total)) if total > 0 => {
            progress.call1(py, (done.min(total), total)).map(|_| ())
        }
        _ => Ok(()),
    };
    run_reporting(py, STEP, &report, work)
}

/// Runs `work` to its end, and `report` on the calling thread after each `step` and at the end. A
/// signal's exception or one from `report` cancels the work and is raised.
pub fn run_reporting<T: Send>(
    py: Python<'_>,
    step: Duration,
    report: &(impl Fn(Python<'_>, &Task) -> PyResult<()> + Sync),
    work: impl FnOnce(&Task) -> lorafast::Result<T> + Send,
) -> PyResult<T> {
    let task = Task::new();
    let report = |py: Python<'_>| -> PyResult<()> {
        py.check_signals()?;
        report(py, &task)
    };
    let mut interruption = None;
    let result = py.detach(|| {
        std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            let worker = scope.spawn(|| {
                // The receiver outlives the worker; a failed send means it panicked.
                let _ = sender.send(work(&task));
                drop(sender);
            });
            loop {
                match receiver.recv_timeout(step) {
                    Ok(result) => break Some(result),
                    Err(RecvTimeoutError::Timeout) if interruption.is_none() => {
                        if let Err(error) = Python::attach(report) {
                            task.cancel();
                            interruption = Some(error);
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        if let Err(panic) = worker.join() {
                            std::panic::resume_unwind(panic);
                        }
                        break None;
                    }
                }
            }
        })
    });
    let result = result.ok_or_else(|| {
        pyo3::exceptions::PyRuntimeError::new_err("a worker ended without a result")
    })?;
    match (interruption, result) {
        // What failed by itself is what there is to say.
        (Some(_), Err(error)) if !matches!(error, lorafast::Error::Cancelled) => {
            Err(to_python(py, error))
        }
        (Some(interruption), Err(_)) => Err(interruption),
        (Some(interruption), Ok(_)) => Err(too_late(py, interruption)),
        (None, Err(error)) => Err(to_python(py, error)),
        (None, Ok(value)) => match report(py) {
            Ok(()) => Ok(value),
            Err(interruption) => Err(too_late(py, interruption)),
        },
    }
}

/// An interruption that came when the work was done, and says so: an output is then in its place.
fn too_late(py: Python<'_>, interruption: PyErr) -> PyErr {
    // Only a note, whose failure changes nothing.
    let _ = interruption.value(py).call_method1("add_note", (FINISHED,));
    interruption
}
