//! What an adapter makes of the base's whole weights, W′ − W₀: of modules that have no product of their
//! own, and of those whose magnitudes rescale the sum with it.

use std::collections::HashMap;
use std::sync::Arc;

use faer::{Mat, MatRef};

use super::BaseNorm;
use crate::adapter::matrix::Matrix;
use crate::adapter::{Adapter, Expert, Module};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, counted};
use crate::execute::compute::Computer;
use crate::kernel::InstructionSet;
use crate::kernel::convert::widen_f64;
use crate::measure::entries::{EntryStatistics, scan_entries};
use crate::measure::spectrum::{Spectrum, Update as SpectrumUpdate, Values};
use crate::measure::statistics::Bins;
use crate::parallel::task::Task;
use crate::plan::{Inputs, Options, Plan, PlannedTensor, Update, UpdateKind};
use crate::tensor::orientation::Orientation;

/// The largest smaller extent of a change of which all singular values are found.
const DENSE: usize = 1536;
/// Steps of the power iteration that finds the largest one of others.
const POWER_STEPS: usize = 64;
/// The relative change of a step at which it ends.
const SETTLED: f64 = 1e-9;

/// Where the modules of an adapter lie that are made of the base's weights.
pub(super) struct Changes {
    inputs: Inputs,
    plan: Plan,
    /// By a module's key and its expert: the tensors and updates that are its pieces, by their positions.
    places: HashMap<(String, Option<u64>), Vec<[usize; 3]>>,
}

/// What became of one module's weight.
pub(super) struct Change {
    /// The weight as it was.
    pub base: BaseNorm,
    /// W′ − W₀, (outputs, inputs).
    difference: Matrix,
}

/// Finds them; none where no module is made so. What cannot be found is among the notes.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::Io`].
pub(super) fn find(
    adapter: &Adapter,
    base: &Checkpoint,
    task: &Task,
    notes: &mut Vec<String>,
) -> Result<Option<Changes>> {
    let needs_weight =
        |module: &&Module| module.delta.transform().is_some() || module.magnitude.is_some();
    let count = adapter.modules().values().filter(needs_weight).count();
    if count == 0 {
        return Ok(None);
    }
    let inputs = Inputs { base: Arc::new(base.clone()), adapters: vec![Arc::new(adapter.clone())] };
    let plan = match Plan::new_with(&inputs, Options::default(), task) {
        Ok(plan) => plan,
        Err(error @ (Error::Cancelled | Error::Io { .. })) => return Err(error),
        Err(error) => {
            let reason = error.to_string().lines().collect::<Vec<_>>().join(" ");
            notes.push(format!(
                "what {} {} of the base's whole weights was not found, for the adapter cannot be merged \
                 into this base: {reason}",
                counted(count, "module"),
                crate::error::agree(count, "makes", "make"),
            ));
            return Ok(None);
        }
    };
    let mut places = HashMap::<_, Vec<[usize; 3]>>::new();
    for (shard, planned) in plan.shards.iter().enumerate() {
        for (position, tensor) in planned.tensors.iter().enumerate() {
            if tensor.source.shape.len() < 2 {
                continue;
            }
            for (number, update) in tensor.updates().iter().enumerate() {
                let is_made = matches!(update.kind, UpdateKind::Transform)
                    || update.kind == UpdateKind::Dora
                        && update.residual.is_none()
                        && update.base_override.is_none();
                if is_made {
                    let expert = update.slice.expert.map(|expert| expert.index);
                    let own = places.entry((update.module.clone(), expert)).or_default();
                    own.push([shard, position, number]);
                }
            }
        }
    }
    Ok(Some(Changes { inputs, plan, places }))
}

impl Changes {
    /// What becomes of the weight of a module, or of one of its experts; `None` where that is not known.
    ///
    /// # Errors
    /// [`Error::Adapter`] or [`Error::Checkpoint`] if a file changed meanwhile, [`Error::Io`],
    /// [`Error::Cancelled`].
    pub fn of(
        &self,
        module: &Module,
        expert: Option<Expert>,
        task: &Task,
    ) -> Result<Option<Change>> {
        let key = (module.key.clone(), expert.map(|expert| expert.index));
        let Some(places) = self.places.get(&key) else { return Ok(None) };
        let mut pieces: Vec<(u64, &PlannedTensor, &Update)> = Vec::new();
        for [shard, position, number] in places {
            let tensor = &self.plan.shards[*shard].tensors[*position];
            let update = &tensor.updates()[*number];
            let first = update.slice.outputs.as_ref().map_or(0, |outputs| outputs.start);
            // A tied weight is one weight.
            if !pieces.iter().any(|(other, ..)| *other == first) {
                pieces.push((first, tensor, update));
            }
        }
        pieces.sort_by_key(|(first, ..)| *first);
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let mut names: Vec<&str> = Vec::new();
        let mut columns = 0;
        for (_, tensor, update) in pieces {
            task.check()?;
            let weight = self.weight(tensor, update, task)?;
            columns = weight.columns;
            before.extend_from_slice(&weight.values);
            after.extend(self.applied(module, update, weight)?.values);
            names.push(&tensor.name);
        }
        names.dedup();
        let norm = norm(&before);
        let values = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        let difference = Matrix { rows: before.len() / columns.max(1), columns, values };
        Ok(Some(Change { base: BaseNorm::new(names.join(", "), norm), difference }))
    }

    /// The weight on which an update lies, (outputs, inputs).
    fn weight(&self, tensor: &PlannedTensor, update: &Update, task: &Task) -> Result<Matrix> {
        let computer = Computer { inputs: &self.inputs, set: InstructionSet::detect(), task };
        let whole = computer.weight(tensor)?;
        let rows = match &update.slice.rows {
            Some(rows) => rows.start as usize..rows.end as usize,
            None => 0..whole.rows,
        };
        let values = whole.values[rows.start * whole.columns..rows.end * whole.columns].to_vec();
        let own = Matrix { rows: rows.len(), columns: whole.columns, values };
        Ok(match update.orientation() {
            Orientation::OutIn => own,
            Orientation::InOut => own.transposed(),
        })
    }

    /// What an update makes of it.
    fn applied(&self, module: &Module, update: &Update, mut weight: Matrix) -> Result<Matrix> {
        let outputs = update.slice.outputs.as_ref();
        if let Some(transform) = module.delta.transform() {
            transform.apply(&mut weight, update.scale, outputs)?;
            return Ok(weight);
        }
        let pair = update.pair(&self.inputs.adapters[0])?;
        let b = widen_f64(&pair.b_dtype, &pair.b);
        let a = widen_f64(&pair.a_dtype, &pair.a);
        let b = Matrix { rows: pair.outputs, columns: pair.rank, values: b };
        let product = b.times(&Matrix { rows: pair.rank, columns: pair.inputs, values: a });
        let magnitude = module.magnitude.as_ref().expect("planned from it").read_f64()?;
        let first = outputs.map_or(0, |outputs| outputs.start as usize);
        for row in 0..weight.rows {
            let values = weight.row_mut(row);
            for (value, change) in values.iter_mut().zip(product.row(row)) {
                *value += update.scale * change;
            }
            let factor = magnitude[first + row] / norm(values);
            values.iter_mut().for_each(|value| *value *= factor);
        }
        Ok(weight)
    }
}

impl Change {
    /// ‖W′ − W₀‖_F.
    pub fn norm(&self) -> f64 {
        norm(&self.difference.values)
    }

    /// All of its elements.
    pub fn values(&self) -> &[f64] {
        &self.difference.values
    }

    /// What its elements are like, in f32 as those of products.
    ///
    /// # Errors
    /// [`Error::Argument`] for unusable bins.
    pub fn entries(&self, bins: &Bins, threshold: f64) -> Result<EntryStatistics> {
        let Matrix { rows, columns, ref values } = self.difference;
        // One factor is the change, the other the identity of its smaller extent.
        let identity = Matrix::identity(rows.min(columns)).values;
        let (left, right) = if columns <= rows { (values, &identity) } else { (&identity, values) };
        let (left, right) = (Values::F64(left), Values::F64(right));
        scan_entries(
            &SpectrumUpdate::new(rows, columns, rows.min(columns), left, right, 1.0)?,
            bins,
            threshold,
        )
    }

    /// (outputs, inputs).
    pub fn shape(&self) -> [usize; 2] {
        [self.difference.rows, self.difference.columns]
    }

    /// Its singular values and what follows from them. Of a large one there are norms alone, and
    /// whether that is so.
    ///
    /// # Errors
    /// [`Error::Numeric`] if it cannot be decomposed.
    pub fn spectrum(&self, name: &str) -> Result<(Spectrum, bool)> {
        let Matrix { rows, columns, ref values } = self.difference;
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let size = self.norm();
        let view = MatRef::from_row_major_slice(values, rows, columns);
        if !size.is_finite() || size == 0.0 {
            let count = if size == 0.0 { 0.0 } else { f64::NAN };
            let all = vec![count; rows.min(columns)];
            return Ok((Spectrum::from_values(rows, columns, all, mean), false));
        }
        if rows.min(columns) <= DENSE {
            let found = view.singular_values().map_err(|_| Error::Numeric {
                tensor: name.to_owned(),
                message: "its change has no singular values that could be found".into(),
            })?;
            return Ok((Spectrum::from_values(rows, columns, found, mean), false));
        }
        let spectrum = Spectrum {
            frobenius_norm: size,
            spectral_norm: largest(view),
            ..Spectrum::from_values(rows, columns, vec![f64::NAN], mean)
        };
        let spectrum = Spectrum { singular_values: Vec::new(), entry_mean: mean, ..spectrum };
        Ok((spectrum, true))
    }
}

/// √Σx².
fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The largest singular value, from below, by power iteration.
fn largest(matrix: MatRef<'_, f64>) -> f64 {
    let mut vector = Mat::from_fn(matrix.ncols(), 1, |row, _| 1.0 + (row % 7) as f64);
    let mut found = 0.0;
    for _ in 0..POWER_STEPS {
        let length = vector.norm_l2();
        let next = matrix.transpose() * (matrix * (faer::Scale(1.0 / length) * vector));
        let value = next.norm_l2().sqrt();
        vector = next;
        if value == 0.0 || (value - found).abs() <= SETTLED * value {
            return value;
        }
        found = value;
    }
    found
}
