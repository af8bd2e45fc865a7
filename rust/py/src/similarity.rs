//! Collections of adapters. Matrices leave as byte arrays, which are NumPy's as they are.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict, PyList};

use lorafast::parallel::task::build_pool;
use lorafast::similarity::{self, Options, Precision};

use crate::convert::to_object;
use crate::errors::to_python;
use crate::job;
use crate::sources::{Source, to_core};

/// Where the factors of many adapters lie.
#[pyclass(frozen, module = "lorafast._core")]
pub struct Collection {
    inner: similarity::Collection,
}

/// What could not be read: its position, and the exception.
type Failures = Vec<(usize, Py<PyAny>)>;

/// Little-endian float64.
fn to_bytes<'py>(py: Python<'py>, values: &[f64]) -> PyResult<Bound<'py, PyByteArray>> {
    PyByteArray::new_with(py, values.len() * 8, |bytes| {
        for (target, value) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(values) {
            *target = value.to_le_bytes();
        }
        Ok(())
    })
}

/// Little-endian float32.
fn to_bytes_f32<'py>(py: Python<'py>, values: &[f32]) -> PyResult<Bound<'py, PyByteArray>> {
    PyByteArray::new_with(py, values.len() * 4, |bytes| {
        for (target, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *target = value.to_le_bytes();
        }
        Ok(())
    })
}

type InnerProducts<'py> =
    (Bound<'py, PyByteArray>, Vec<Bound<'py, PyByteArray>>, usize, (f64, f64), Option<String>);

/// A digest, and for each block its multiplications and the members of both sides.
type PlannedBlocks = (String, Vec<(u64, Vec<usize>, Vec<usize>)>);

type StackedFactors<'py> =
    (Vec<usize>, Vec<usize>, Vec<f64>, Bound<'py, PyByteArray>, Bound<'py, PyByteArray>);

/// Opens each adapter for a moment. Returns the collection, and the position and the exception of
/// each that could not be read.
#[pyfunction]
#[pyo3(signature = (adapters, *, threads, progress))]
pub fn open_collection(
    py: Python<'_>,
    adapters: Vec<Source>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Collection, Failures)> {
    let adapters = to_core(adapters);
    let (inner, failures) = job::run(py, progress, |task| {
        similarity::Collection::open(&adapters, &build_pool(threads)?, task)
    })?;
    let failures = failures
        .into_iter()
        .map(|(position, error)| (position, to_python(py, error).into_value(py).into_any()));
    Ok((Collection { inner }, failures.collect()))
}

#[pymethods]
impl Collection {
    /// The members as plain objects.
    fn members(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let members = PyList::empty(py);
        for member in self.inner.members() {
            let item = PyDict::new(py);
            item.set_item("path", member.path().display().to_string())?;
            item.set_item("base", member.base())?;
            item.set_item("modules", member.module_positions())?;
            item.set_item("ranks", member.ranks())?;
            item.set_item("bytes", member.bytes())?;
            item.set_item("left_out", member.left_out())?;
            item.set_item("family", member.family())?;
            members.append(item)?;
        }
        Ok(members.into_any().unbind())
    }

    /// Name, m and n of every module.
    fn modules(&self) -> Vec<(&str, usize, usize)> {
        let modules = self.inner.modules().iter();
        modules.map(|module| (module.name.as_str(), module.rows, module.columns)).collect()
    }

    /// The members by their base.
    fn groups(&self, by_shape_alone: bool) -> Vec<(String, Vec<usize>)> {
        let groups = self.inner.groups(by_shape_alone).into_iter();
        groups.map(|group| (group.base, group.members)).collect()
    }

    /// Why two members are not comparable, in words; none where they are.
    fn reason_apart(&self, x: usize, y: usize) -> Option<&str> {
        self.inner.reason_apart(x, y)
    }

    /// Multiplications that the products within groups take.
    fn work(&self, py: Python<'_>, groups: Vec<Vec<usize>>) -> u64 {
        py.detach(|| similarity::work(&self.inner, &groups))
    }

    /// N×N inner products of all and of each module, the number of blocks that were in the cache,
    /// the seconds that reading and multiplying took, and why the cache could not be written.
    #[pyo3(signature = (groups, *, precision, per_module, memory, cache, threads, progress))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
    fn products<'py>(
        &self,
        py: Python<'py>,
        groups: Vec<Vec<usize>>,
        precision: &str,
        per_module: bool,
        memory: usize,
        cache: Option<PathBuf>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<InnerProducts<'py>> {
        let precision = Precision::from_name(precision).map_err(|error| to_python(py, error))?;
        let options = Options { precision, per_module, memory, cache };
        let products = job::run(py, progress, |task| {
            similarity::products(&self.inner, &groups, &options, &build_pool(threads)?, task)
        })?;
        let modules = products.modules.iter().map(|module| to_bytes(py, module));
        let modules = modules.collect::<PyResult<_>>()?;
        let times = &products.times;
        let seconds = (times.reading.as_secs_f64(), times.multiplying.as_secs_f64());
        Ok((to_bytes(py, &products.all)?, modules, products.found, seconds, products.unsaved))
    }

    /// The blocks of those products, of at most so many ranks on a side, for other processes: a
    /// digest of what they are of, and for each its multiplications and the members of both sides.
    #[pyo3(signature = (groups, *, precision, per_module, memory, ranks))]
    fn blocks(
        &self,
        py: Python<'_>,
        groups: Vec<Vec<usize>>,
        precision: &str,
        per_module: bool,
        memory: usize,
        ranks: usize,
    ) -> PyResult<PlannedBlocks> {
        let precision = Precision::from_name(precision).map_err(|error| to_python(py, error))?;
        let options = Options { precision, per_module, memory, cache: None };
        let (digest, blocks) =
            py.detach(|| similarity::blocks(&self.inner, &groups, &options, ranks));
        let plain = blocks.into_iter().map(|block| {
            let [rows, columns] = block.members;
            (block.work, rows, columns)
        });
        Ok((digest, plain.collect()))
    }

    /// The products of one of these blocks: of all, and of each module.
    #[pyo3(signature = (groups, index, digest, *, precision, per_module, memory, ranks, threads))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
    fn block<'py>(
        &self,
        py: Python<'py>,
        groups: Vec<Vec<usize>>,
        index: usize,
        digest: &str,
        precision: &str,
        per_module: bool,
        memory: usize,
        ranks: usize,
        threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Vec<Bound<'py, PyByteArray>>)> {
        let precision = Precision::from_name(precision).map_err(|error| to_python(py, error))?;
        let options = Options { precision, per_module, memory, cache: None };
        let (all, modules) = job::run(py, None, |task| {
            let (pool, of) = (build_pool(threads)?, (index, digest));
            similarity::block_products(&self.inner, &groups, of, &options, ranks, &pool, task)
        })?;
        let modules = modules.iter().map(|module| to_bytes(py, module)).collect::<PyResult<_>>()?;
        Ok((to_bytes(py, &all)?, modules))
    }

    /// The factors of some members that have a module: those members, the rank of each, the factor
    /// on each product, and B and A of each after one another, in that precision.
    #[pyo3(signature = (module, members, *, precision, threads))]
    fn stacked<'py>(
        &self,
        py: Python<'py>,
        module: usize,
        members: Vec<usize>,
        precision: &str,
        threads: Option<usize>,
    ) -> PyResult<StackedFactors<'py>> {
        let precision = Precision::from_name(precision).map_err(|error| to_python(py, error))?;
        match precision {
            Precision::Double => {
                let read = |_: &_| {
                    similarity::stacked_f64(&self.inner, module, &members, &build_pool(threads)?)
                };
                let found = job::run(py, None, read)?;
                let (b, a) = (to_bytes(py, &found.b)?, to_bytes(py, &found.a)?);
                Ok((found.members, found.ranks, found.scales, b, a))
            }
            Precision::Single => {
                let read = |_: &_| {
                    similarity::stacked_f32(&self.inner, module, &members, &build_pool(threads)?)
                };
                let found = job::run(py, None, read)?;
                let (b, a) = (to_bytes_f32(py, &found.b)?, to_bytes_f32(py, &found.a)?);
                Ok((found.members, found.ranks, found.scales, b, a))
            }
        }
    }

    /// Some members' signatures as plain objects with its leading singular values, or the exception
    /// in their place.
    #[pyo3(signature = (members, *, threads, progress))]
    fn signatures<'py>(
        &self,
        py: Python<'py>,
        members: Vec<usize>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<(Py<PyAny>, Bound<'py, PyByteArray>)>> {
        let signatures = job::run(py, progress, |task| {
            similarity::signatures(&self.inner, &members, &build_pool(threads)?, task)
        })?;
        let convert = |signature: lorafast::Result<similarity::Signature>| match signature {
            Ok(signature) => Ok((to_object(py, &signature)?, to_bytes(py, &signature.leading)?)),
            Err(error) => {
                let error = to_python(py, error).into_value(py).into_any();
                Ok((error, PyByteArray::new(py, &[])))
            }
        };
        signatures.into_iter().map(convert).collect()
    }

    /// How the two of each pair lie to each other, as plain objects.
    #[pyo3(signature = (pairs, *, threads, progress))]
    fn relations(
        &self,
        py: Python<'_>,
        pairs: Vec<(usize, usize)>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let relations = job::run(py, progress, |task| {
            similarity::relations(&self.inner, &pairs, &build_pool(threads)?, task)
        })?;
        to_object(py, &relations)
    }

    /// ‖T − Σ wᵢ·Cᵢ‖.
    #[pyo3(signature = (target, terms, *, threads))]
    fn combination_norm(
        &self,
        py: Python<'_>,
        target: usize,
        terms: Vec<(usize, f64)>,
        threads: Option<usize>,
    ) -> PyResult<f64> {
        job::run(py, None, |task| {
            task.check()?;
            let pool = build_pool(threads)?;
            pool.install(|| similarity::combination_norm(&self.inner, target, &terms))
        })
    }

    /// How some members, in this order, move from one to the next, as plain objects.
    #[pyo3(signature = (order, *, threads, progress))]
    fn drift(
        &self,
        py: Python<'_>,
        order: Vec<usize>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let steps = job::run(py, progress, |task| {
            similarity::drift(&self.inner, &order, &build_pool(threads)?, task)
        })?;
        to_object(py, &steps)
    }
}
