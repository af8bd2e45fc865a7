//! Parameters that were trained whole, and trained rows of embeddings, of several adapters as one.
//!
//! What an adapter changes is Dᵢ = savedᵢ − W, which only the base tells; the result is W and what the method
//! makes of the Dᵢ, a parameter that an adapter lacks counting as zero.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;
use rayon::prelude::*;

use super::dense::Dense;
use super::merge::Updates;
use super::methods::{Family, Method};
use crate::adapter::factors::common;
use crate::adapter::{Adapter, Saved, TrainedRows};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Owner, Result, counted};
use crate::kernel::convert::{convert, widen_f64};
use crate::linalg::Matrix;
use crate::parallel::task::Task;
use crate::plan::{self, Inputs, Origin, Plan, UpdateKind};
use crate::storage::scratch::ScratchFile;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, Tensor, TensorFile, TensorInfo};
use crate::weights::Weight;

/// Elements that are worked on together.
const TILE: usize = 1 << 18;

/// The parameters of the base that some adapters bring whole or in rows, by the base's names.
pub(crate) struct Parameters<'a> {
    base: &'a Checkpoint,
    adapters: &'a [Adapter],
    all: IndexMap<String, Vec<Change<'a>>>,
}

/// What one adapter brings.
#[derive(Debug, Clone, Copy)]
struct Change<'a> {
    adapter: usize,
    brought: Brought<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Brought<'a> {
    Whole(&'a Saved),
    Rows(&'a TrainedRows),
}

/// What became of them. The file that holds them is removed with this value.
#[derive(Debug)]
pub(crate) struct Combined {
    pub saved: Vec<Saved>,
    pub rows: Vec<TrainedRows>,
    _file: ScratchFile,
}

impl<'a> Parameters<'a> {
    /// Finds them; `None` where no adapter brings any.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a parameter that the base does not have, for one of another shape, and for one
    /// that factors change as well; those of a merge of each adapter into the base.
    pub fn of(
        adapters: &'a [Adapter],
        base: &'a Arc<Checkpoint>,
        task: &Task,
    ) -> Result<Option<Self>> {
        let brings =
            |adapter: &Adapter| !adapter.saved().is_empty() || !adapter.trained_rows().is_empty();
        if !adapters.iter().any(brings) {
            return Ok(None);
        }
        let mut all = IndexMap::<String, Vec<Change<'a>>>::new();
        let mut factored = HashMap::<String, usize>::new();
        for (position, adapter) in adapters.iter().enumerate() {
            let inputs = Inputs { base: base.clone(), adapters: vec![Arc::new(adapter.clone())] };
            let plan = Plan::new_with(&inputs, plan::Options::default(), task)?;
            let names = Names::of(&plan);
            factored.extend(names.factored.iter().map(|name| (name.clone(), position)));
            let rows = adapter.trained_rows().iter().map(Brought::Rows);
            for brought in adapter.saved().iter().map(Brought::Whole).chain(rows) {
                let tensor = brought.tensor();
                // What is the base's own again changes nothing.
                let Some(name) = names.brought.get(&tensor.name) else { continue };
                if names.sliced.contains(&tensor.name) && matches!(brought, Brought::Whole(_)) {
                    return Err(Error::unsupported(
                        adapter.path(),
                        format!("brings {} whole, which the base stores in pieces", brought.path()),
                    ));
                }
                all.entry(name.clone()).or_default().push(Change { adapter: position, brought });
            }
        }
        for (name, changes) in &all {
            check(name, changes, adapters, base)?;
            if let Some(other) = factored.get(name) {
                let (own, path) = (changes[0].adapter, changes[0].brought.path());
                return Err(Error::unsupported(
                    adapters[own].path(),
                    format!(
                        "brings {path} whole, and {} changes it by a module's update: a sum of both is \
                         not known how to write",
                        adapters[*other].path().display()
                    ),
                ));
            }
        }
        Ok(Some(Self { base, adapters, all }))
    }

    /// What they are called where weights are given by patterns.
    pub fn names(&self) -> Vec<String> {
        self.all.values().map(|changes| changes[0].brought.title()).collect()
    }

    /// Whether nothing of the base changes.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// What a user would want to know of them.
    pub fn note(&self) -> String {
        let names = self.names();
        let more = match names.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        format!(
            "{} trained whole or in rows ({}{more}): the base's and what the method makes of the changes",
            counted(names.len(), "parameter"),
            names[0],
        )
    }

    /// Checks that the method is defined for them.
    ///
    /// # Errors
    /// [`Error::Argument`] for methods of products.
    pub fn check_method(&self, method: &Method, name: &str) -> Result<()> {
        match method.family {
            Family::Sum(_) | Family::Entries(_) => Ok(()),
            Family::Joint(_) | Family::Raw(_) => Err(Error::Argument(format!(
                "the method {name} takes products of two factors, and {} was trained whole",
                self.names()[0]
            ))),
        }
    }

    /// Combines them into a file, in that type or in the widest of what the adapters store.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is not finite, or too large for the type; [`Error::Io`],
    /// [`Error::Cancelled`].
    pub fn combined(
        &self,
        (method, weights, seed): (&Method, &[Weight], u64),
        dtype: Option<&Dtype>,
        file: ScratchFile,
        task: &Task,
    ) -> Result<Combined> {
        let mut header = Header::default();
        for (name, changes) in &self.all {
            task.check()?;
            let title = changes[0].brought.title();
            let own = Parameter::of(self, name, changes);
            let widest = changes.iter().map(|change| change.brought.tensor().dtype.clone());
            let widest = widest.reduce(|one, other| common(&one, &other)).unwrap_or(Dtype::F32);
            let dtype = dtype.cloned().unwrap_or(widest);
            let weights: Vec<f64> = weights.iter().map(|weight| weight.of(&title)).collect();
            let result = own.result(method, &weights, (&title, seed), task)?;
            let mut parts: Vec<u64> = Vec::new();
            let mut length = 0;
            for range in own.tiles() {
                task.check()?;
                let values = result.rows(&own, &range)?;
                let wide: &[u8] = bytemuck::cast_slice(&values);
                let mut bytes = vec![0; values.len() * dtype.size()];
                let fits = match dtype {
                    Dtype::F64 => {
                        bytes.copy_from_slice(wide);
                        true
                    }
                    _ => convert(&Dtype::F64, wide, &dtype, &mut bytes),
                };
                if !fits || values.iter().any(|value| !value.is_finite()) {
                    return Err(Error::Argument(format!(
                        "{title} becomes something that is not finite, or too large for {dtype}"
                    )));
                }
                parts.push(file.append(&[&bytes])?);
                length += bytes.len() as u64;
            }
            let start = parts.first().copied().unwrap_or(0);
            let mut shape = self.base.tensor(name).expect("it was looked for").shape.clone();
            if let Some(rows) = &own.rows {
                shape[0] = rows.len() as u64;
            }
            header.tensors.push(TensorInfo {
                name: name.clone(),
                dtype,
                shape,
                range: start..start + length,
            });
        }
        let raw = Arc::new(TensorFile::of_raw_file(file.path(), Owner::Adapter, header)?);
        let (mut saved, mut rows) = (Vec::new(), Vec::new());
        for (name, changes) in &self.all {
            let tensor: Tensor = raw.value(name).expect("it was put");
            let path = changes[0].brought.path().to_owned();
            match Parameter::of(self, name, changes).rows {
                Some(own) => rows.push(TrainedRows { path, rows: own, tensor }),
                None => {
                    let whole = changes.iter().find_map(|change| match change.brought {
                        Brought::Whole(saved) => Some(saved),
                        Brought::Rows(_) => None,
                    });
                    let whole = whole.expect("one is whole");
                    let is_apart = |change: &Change<'_>| match change.brought {
                        Brought::Whole(saved) => saved.trained_apart,
                        Brought::Rows(_) => false,
                    };
                    let trained_apart = changes.iter().any(is_apart);
                    saved.push(Saved { path: whole.path.clone(), tensor, trained_apart });
                }
            }
        }
        self.adapters.iter().try_for_each(Adapter::check_unchanged)?;
        self.base.check_unchanged()?;
        Ok(Combined { saved, rows, _file: file })
    }
}

/// The base's names of an adapter's tensors.
#[derive(Default)]
struct Names {
    brought: HashMap<String, String>,
    /// Tensors that lie on a part of the base's.
    sliced: HashSet<String>,
    /// The base's tensors that modules change.
    factored: HashSet<String>,
}

impl Names {
    fn of(plan: &Plan) -> Self {
        let mut names = Self::default();
        for (_, tensor) in plan.tensors() {
            if let Origin::Adapter(_) = tensor.origin {
                names.brought.entry(tensor.source.name.clone()).or_insert(tensor.name.clone());
            }
            for update in tensor.updates() {
                if update.kind != UpdateKind::Replace {
                    names.factored.insert(tensor.name.clone());
                    continue;
                }
                if update.slice.rows.is_some() {
                    names.sliced.insert(update.module.clone());
                }
                names.brought.entry(update.module.clone()).or_insert(tensor.name.clone());
            }
        }
        names
    }
}

impl<'a> Brought<'a> {
    fn tensor(self) -> &'a Tensor {
        match self {
            Self::Whole(saved) => &saved.tensor,
            Self::Rows(rows) => &rows.tensor,
        }
    }

    fn path(self) -> &'a str {
        match self {
            Self::Whole(saved) => &saved.path,
            Self::Rows(rows) => &rows.path,
        }
    }

    /// What it is called: a weight by its module, anything else by its path.
    fn title(self) -> String {
        let path = self.path();
        path.strip_suffix(".weight").unwrap_or(path).to_owned()
    }
}

/// # Errors
/// As [`Parameters::of`].
fn check(
    name: &str,
    changes: &[Change<'_>],
    adapters: &[Adapter],
    base: &Checkpoint,
) -> Result<()> {
    let refused = |change: &Change<'_>, why: String| {
        Err(Error::unsupported(
            adapters[change.adapter].path(),
            format!("brings {} whole, {why}", change.brought.path()),
        ))
    };
    for change in changes {
        let Some(tensor) = base.tensor(name) else {
            return refused(
                change,
                "which the base does not have, so that nobody knows what it changes".to_owned(),
            );
        };
        let own = change.brought.tensor();
        if !tensor.dtype.is_mergeable() || !own.dtype.is_mergeable() {
            return refused(change, format!("which the base stores as {}", tensor.dtype));
        }
        if matches!(change.brought, Brought::Whole(_)) && own.shape != tensor.shape {
            return refused(
                change,
                format!(
                    "with the shape {:?}, and the base's has {:?}: of what one has alone there is no \
                     change",
                    own.shape, tensor.shape
                ),
            );
        }
    }
    let twice = changes.windows(2).find(|pair| pair[0].adapter == pair[1].adapter);
    match twice {
        Some(pair) => refused(&pair[0], format!("and again as {}", pair[1].brought.path())),
        None => Ok(()),
    }
}

/// One parameter of the base with what adapters make of it.
struct Parameter<'p> {
    of: &'p Parameters<'p>,
    name: &'p str,
    changes: &'p [Change<'p>],
    /// The rows that any of them changes, where none changes all.
    rows: Option<Vec<u64>>,
    /// Of the base's tensor; a vector has one column.
    height: usize,
    width: usize,
}

/// What a method makes of the changes.
enum Outcome {
    /// The factor of each adapter's.
    Sum(Vec<f64>),
    /// All elements; of those rows that change, where not all do.
    Dense(Dense),
}

impl Outcome {
    /// Some rows of the parameter as they become.
    fn rows(&self, own: &Parameter<'_>, range: &Range<usize>) -> Result<Vec<f64>> {
        let base = own.base_rows(range)?;
        let mut sum = base.clone();
        match self {
            Self::Sum(coefficients) => {
                for change in own.changes {
                    let coefficient = coefficients[change.adapter];
                    // One alone is what it was, without the rounding of a difference.
                    if coefficient == 1.0 && own.changes.len() == 1 {
                        return own.new_rows(change, range, base);
                    }
                    let after = own.new_rows(change, range, base.clone())?;
                    let pairs = after.iter().zip(&base);
                    for (sum, (after, before)) in sum.iter_mut().zip(pairs) {
                        *sum += coefficient * (after - before);
                    }
                }
            }
            Self::Dense(dense) => {
                let values = &dense.values()[range.start * own.width..range.end * own.width];
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(*value));
            }
        }
        Ok(sum)
    }
}

impl<'p> Parameter<'p> {
    fn of(of: &'p Parameters<'p>, name: &'p str, changes: &'p [Change<'p>]) -> Self {
        let shape = &of.base.tensor(name).expect("it was looked for").shape;
        let height = shape.first().copied().unwrap_or(1) as usize;
        let width = shape.get(1..).map_or(1, |rest| rest.iter().product::<u64>() as usize);
        let mut rows = Some(Vec::new());
        for change in changes {
            match (change.brought, &mut rows) {
                (Brought::Rows(own), Some(rows)) => rows.extend_from_slice(&own.rows),
                _ => rows = None,
            }
        }
        if let Some(rows) = &mut rows {
            rows.sort_unstable();
            rows.dedup();
        }
        Self { of, name, changes, rows, height, width }
    }

    /// How many rows are computed.
    fn len(&self) -> usize {
        self.rows.as_ref().map_or(self.height, Vec::len)
    }

    fn tiles(&self) -> Vec<Range<usize>> {
        let height = (TILE / self.width.max(1)).max(1);
        (0..self.len()).step_by(height).map(|first| first..self.len().min(first + height)).collect()
    }

    /// Rows of the base.
    fn base_rows(&self, range: &Range<usize>) -> Result<Vec<f64>> {
        let location = self.of.base.tensors()[self.name];
        let file = &self.of.base.shards()[location.shard].file;
        let info = self.of.base.at(location);
        let row = (self.width * info.dtype.size()) as u64;
        let read = |rows: Range<u64>| -> Result<Vec<f64>> {
            let bytes = file.read_range(info, rows.start * row..rows.end * row)?;
            Ok(widen_f64(&info.dtype, &bytes))
        };
        match &self.rows {
            None => read(range.start as u64..range.end as u64),
            Some(rows) => {
                let each = rows[range.clone()].iter().map(|row| read(*row..row + 1));
                Ok(each.collect::<Result<Vec<_>>>()?.concat())
            }
        }
    }

    /// What an adapter makes of rows that are the base's.
    fn new_rows(
        &self,
        change: &Change<'_>,
        range: &Range<usize>,
        mut base: Vec<f64>,
    ) -> Result<Vec<f64>> {
        let width = self.width as u64;
        match change.brought {
            Brought::Whole(saved) => {
                let bytes =
                    saved.tensor.read_rows(width, &(range.start as u64..range.end as u64))?;
                Ok(widen_f64(&saved.tensor.dtype, &bytes))
            }
            Brought::Rows(own) => {
                for (place, target) in range.clone().zip(base.chunks_exact_mut(self.width)) {
                    let row = self.rows.as_ref().map_or(place as u64, |rows| rows[place]);
                    let Some(at) = own.rows.iter().position(|other| *other == row) else {
                        continue;
                    };
                    let bytes = own.tensor.read_rows(width, &(at as u64..at as u64 + 1))?;
                    target.copy_from_slice(&widen_f64(&own.tensor.dtype, &bytes));
                }
                Ok(base)
            }
        }
    }

    /// Dᵢ in some rows.
    fn difference(&self, change: &Change<'_>, range: &Range<usize>) -> Result<Vec<f64>> {
        let base = self.base_rows(range)?;
        let mut after = self.new_rows(change, range, base.clone())?;
        after.iter_mut().zip(base).for_each(|(value, base)| *value -= base);
        Ok(after)
    }

    fn result(
        &self,
        method: &Method,
        weights: &[f64],
        (title, seed): (&str, u64),
        task: &Task,
    ) -> Result<Outcome> {
        match &method.family {
            Family::Entries(entries) => {
                let mut dense: Vec<Option<Dense>> = weights.iter().map(|_| None).collect();
                // A vector is one row.
                let [rows, columns] =
                    if self.width == 1 { [1, self.len()] } else { [self.len(), self.width] };
                for change in self.changes {
                    task.check()?;
                    let mut values = Vec::with_capacity(rows * columns);
                    for range in self.tiles() {
                        let own = self.difference(change, &range)?;
                        values.extend(own.into_iter().map(|value| value as f32));
                    }
                    dense[change.adapter] = Some(Dense::new(rows, columns, values));
                }
                let updates: Vec<_> = weights.iter().map(|_| None).collect();
                let (updates, dense, shape) = (&updates[..], &dense[..], [rows, columns]);
                let (name, mask) = (title, title);
                let of = Updates { name, mask, updates, dense, weights, shape, seed };
                let found = Dense::of(*entries, method.lambda, &of);
                found.map(Outcome::Dense).ok_or_else(|| {
                    Error::Argument(format!(
                        "{title} has values that are not finite (NaN or infinity), of which nothing can \
                         be computed"
                    ))
                })
            }
            Family::Sum(gram) => {
                let mut failure = None;
                let products = || {
                    let found = self.products(weights.len(), task);
                    found.unwrap_or_else(|error| {
                        failure = Some(error);
                        Matrix::zeros(weights.len(), weights.len())
                    })
                };
                let mut coefficients = gram.coefficients_with(products, weights);
                if let Some(error) = failure {
                    return Err(error);
                }
                coefficients.iter_mut().for_each(|value| *value *= method.lambda);
                Ok(Outcome::Sum(coefficients))
            }
            Family::Joint(_) | Family::Raw(_) => unreachable!("checked before"),
        }
    }

    /// ⟨Dᵢ, Dⱼ⟩ of all adapters.
    fn products(&self, count: usize, task: &Task) -> Result<Matrix> {
        let of_tile = |range: &Range<usize>| -> Result<Vec<f64>> {
            task.check()?;
            let all: Vec<Vec<f64>> = (self.changes.iter())
                .map(|change| self.difference(change, range))
                .collect::<Result<_>>()?;
            let mut own = Vec::new();
            for (i, one) in all.iter().enumerate() {
                for other in &all[..=i] {
                    own.push(one.iter().zip(other).map(|(x, y)| x * y).sum());
                }
            }
            Ok(own)
        };
        let parts: Vec<Vec<f64>> = self.tiles().par_iter().map(of_tile).collect::<Result<_>>()?;
        let mut products = Matrix::zeros(count, count);
        let mut place = 0;
        for (i, one) in self.changes.iter().enumerate() {
            for other in &self.changes[..=i] {
                let sum: f64 = parts.iter().map(|part| part[place]).sum();
                products.set(one.adapter, other.adapter, sum);
                products.set(other.adapter, one.adapter, sum);
                place += 1;
            }
        }
        Ok(products)
    }
}
