//! A merged tensor's updates as plain factors, for executors that bring arithmetic of their own.
//!
//! An executor makes of each tile, a run of rows of the tensor's matrix within one of its segments:
//! stage after stage, from what the stages before left (S, at first W₀), and over the updates whose
//! rows those are,
//!
//! (1 − Σ w) · S + Σ w · V, with the sums over the updates that override S,
//! \+ Σ w · c · (B · A), over all products of the others,
//!
//! where V is m/‖S + Σ c · (B · A)‖ ⊙ (S + Σ c · (B · A)) of DoRA, or the replacement; all in f32
//! (f64 for a tensor in f64) with one rounding at the end.

use std::ops::Range;

use serde::Serialize;

use super::compute::Computer;
use super::session::TensorId;
use super::tile;
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::{Error, Result};
use crate::execute::residual::Weight;
use crate::kernel::{InstructionSet, convert};
use crate::parallel::task::Task;
use crate::plan::{Action, Inputs, Origin, Plan, PlannedTensor, Precision, UpdateKind};
use crate::tensor::dtype::Dtype;

/// A tensor that adapters change, as an executor has to know it.
#[derive(Debug, Serialize)]
pub struct ChangedTensor<'a> {
    /// Its shard's position, and its own in it.
    #[serde(rename = "place")]
    pub id: TensorId,
    /// Its name.
    pub name: &'a str,
    /// Rows of its matrix.
    pub rows: usize,
    /// Columns of its matrix.
    pub columns: usize,
    /// The type in which its rows are read.
    pub dtype: &'a str,
    /// The type in which they are written.
    pub output_dtype: &'a str,
    /// Ranges of rows that the same updates change; no tile crosses their ends.
    pub segments: Vec<(usize, usize)>,
    /// Multiplications of all its products.
    pub work: u64,
    /// Whether its rows are stored as codes.
    #[serde(rename = "quantised")]
    pub quantized: bool,
    /// Whether W₀ is an adapter's tensor.
    pub replaced: bool,
    /// Its shape.
    pub shape: &'a [u64],
    /// How many updates it has; of a tensor that is brought whole perhaps none.
    pub updates: usize,
    /// Whether all of W₀ is needed: some of it was taken out by an adapter's initialisation, or an
    /// update is made of the whole.
    pub residual: bool,
    /// Whether an update is made of the whole of what those of earlier stages leave, which is done here
    /// alone.
    pub staged_whole: bool,
    /// Whether it is a sum of real numbers that is rounded once.
    pub exact: bool,
    /// Whether all that is done to it is that products and vectors are added.
    pub only_adds: bool,
}

fn is_replaced(tensor: &PlannedTensor) -> bool {
    matches!(tensor.origin, Origin::Adapter(_))
}

/// W₀ of a tensor that an adapter brings whole: its type and its bytes.
///
/// # Errors
/// [`Error::Adapter`] if the file changed meanwhile, [`Error::Io`].
pub fn replacement(inputs: &Inputs, tensor: &PlannedTensor) -> Result<Option<(Dtype, Vec<u8>)>> {
    let Origin::Adapter(adapter) = tensor.origin else { return Ok(None) };
    let file = inputs.adapters[adapter].file();
    let bytes = file.read(&tensor.source)?;
    file.check_unchanged()?;
    Ok(Some((tensor.source.dtype.clone(), bytes)))
}

/// Every tensor that adapters change: merged, or brought whole.
pub fn changed_tensors(plan: &Plan) -> Vec<ChangedTensor<'_>> {
    let tensors = plan.shards.iter().enumerate().flat_map(|(shard, planned)| {
        planned
            .tensors
            .iter()
            .enumerate()
            .map(move |(position, tensor)| ((shard, position), tensor))
    });
    tensors
        .filter(|(_, tensor)| !tensor.updates().is_empty() || is_replaced(tensor))
        .map(|(id, tensor)| {
            let (rows, columns) = tensor.matrix();
            let work = tensor.updates().iter().map(|update| {
                let row_range = update.slice.rows.clone().unwrap_or(0..rows as u64);
                (row_range.end - row_range.start) * columns as u64 * update.rank
            });
            ChangedTensor {
                id,
                name: &tensor.name,
                rows,
                columns,
                dtype: tensor.source.dtype.name(),
                output_dtype: tensor.output_dtype.name(),
                segments: tensor
                    .segments()
                    .into_iter()
                    .map(|rows| (rows.start, rows.end))
                    .collect(),
                work: work.sum(),
                quantized: tensor.quantized.is_some(),
                replaced: is_replaced(tensor),
                shape: &tensor.source.shape,
                updates: tensor.updates().len(),
                residual: tensor.updates().iter().any(|update| {
                    update.residual.is_some() || update.kind == UpdateKind::Transform
                }),
                staged_whole: tensor
                    .updates()
                    .iter()
                    .any(|update| update.kind == UpdateKind::Transform && update.stage > 0),
                exact: tensor.precision == Precision::Exact,
                only_adds: tensor
                    .updates()
                    .iter()
                    .all(|update| matches!(update.kind, UpdateKind::LowRank | UpdateKind::Vector)),
            }
        })
        .collect()
}

/// One product B·A with the factor on it, the update's weight left out.
#[derive(Debug)]
pub struct Product {
    /// The factors.
    pub pair: Pair,
    /// The factor on the product.
    pub coefficient: f64,
}

/// What one update does to the rows that it lies on.
#[derive(Debug)]
pub struct Operands {
    /// What it does.
    pub kind: UpdateKind,
    /// The adapter's weight under the strategy.
    pub weight: f64,
    /// Updates are made from what those of all lower stages leave.
    pub stage: usize,
    /// The rows of the tensor's matrix that it lies on.
    pub rows: Range<usize>,
    /// Whether the products lie transposed: Aᵀ·Bᵀ.
    pub transposed: bool,
    /// What is added to what it is made from.
    pub products: Vec<Product>,
    /// DoRA's magnitudes of the outputs, in f64.
    pub magnitude: Option<Vec<f64>>,
    /// The adapter's own values on those rows, where they override what it is made from.
    pub base_override: Option<(Dtype, Vec<u8>)>,
}

/// The updates of a merged tensor, in their order. `weight` is all of W₀ in f64, row after row, for
/// whoever holds it elsewhere than in the base's files; it is needed where an adapter's
/// initialisation took a part out of it.
///
/// # Errors
/// That a file changed, [`Error::Io`] if W₀ cannot be read, [`Error::Numeric`] if it cannot be
/// decomposed.
pub fn operands(
    inputs: &Inputs,
    tensor: &PlannedTensor,
    weight: Option<Vec<f64>>,
) -> Result<Vec<Operands>> {
    if matches!(tensor.action, Action::MergeEntries(_)) {
        return Err(Error::Argument(format!(
            "{} is merged element by element, which is done in files and on the CPU alone; use \
             lorafast.merge, without a device",
            tensor.name
        )));
    }
    let (rows, columns) = tensor.matrix();
    let task = Task::new();
    let computer = Computer { inputs, set: InstructionSet::detect(), task: &task };
    let mut whole = weight.map(|values| Weight { rows, columns, values });
    let mut result = Vec::new();
    for update in tensor.updates() {
        let adapter = &inputs.adapters[update.adapter];
        let mut products = Vec::new();
        if let Some(residual) = update.residual {
            let weight = match &whole {
                Some(weight) => weight,
                None => &*whole.insert(computer.weight(tensor)?),
            };
            let pair = weight
                .removed(residual, update.rank as usize, update.orientation())
                .map_err(|message| Error::Numeric { tensor: tensor.name.clone(), message })?;
            products.push(Product { pair, coefficient: -residual.scale(update.scale) });
        }
        if !matches!(update.kind, UpdateKind::Replace | UpdateKind::Transform) {
            products.push(Product { pair: update.pair(adapter)?, coefficient: update.scale });
        }
        let row_range = update.slice.rows.as_ref();
        let rows =
            row_range.map_or(0..rows, |row_range| row_range.start as usize..row_range.end as usize);
        let replacement = (update.kind == UpdateKind::Replace).then_some(&update.module);
        let base_override = replacement.or(update.base_override.as_ref()).map(|name| {
            let tensor = adapter.tensor(name).expect("planned from this tensor");
            let first = update.slice.outputs.as_ref().map_or(0, |rows| rows.start as usize);
            let row = columns * tensor.dtype.size();
            let bytes = (first * row) as u64..((first + rows.len()) * row) as u64;
            Ok((tensor.dtype.clone(), tensor.read_range(bytes)?))
        });
        let mut base_override = base_override.transpose()?;
        let mut kind = update.kind;
        if kind == UpdateKind::Transform {
            if update.stage > 0 {
                return Err(Error::Argument(format!(
                    "{} is made of the whole of what other adapters leave of it, which is done on the \
                     CPU alone; merge the files",
                    tensor.name
                )));
            }
            let weight = match &whole {
                Some(weight) => weight,
                None => &*whole.insert(computer.weight(tensor)?),
            };
            let own = weight.values[rows.start * columns..rows.end * columns].to_vec();
            let mut own = Matrix { rows: rows.len(), columns, values: own };
            update.transform(adapter, &mut own)?;
            // To whoever takes it, it is a replacement.
            kind = UpdateKind::Replace;
            base_override = Some((Dtype::F64, own.into_bytes()));
        }
        let is_dora = update.kind == UpdateKind::Dora;
        result.push(Operands {
            kind,
            weight: update.weight,
            stage: update.stage,
            rows,
            transposed: update.transposed,
            products,
            magnitude: is_dora.then(|| tile::magnitude(adapter, update)).transpose()?,
            base_override,
        });
        // Whoever computes elsewhere never looks at the file; what he was given is of one state.
        adapter.file().check_unchanged()?;
    }
    Ok(result)
}

/// Numbers of any mergeable type in f64.
pub fn widen(dtype: &Dtype, bytes: &[u8]) -> Vec<f64> {
    convert::widen_f64(dtype, bytes)
}
