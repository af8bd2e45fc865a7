//! The pass over parameters that the base stores in slices, each a tensor, or as rows of another
//! tensor.

use std::ops::Range;

use super::checks::{refuse_integers, refuse_subtracting, residual_of};
use super::quantized;
use super::targets::TargetedModule;
use crate::adapter::{LayerKind, Module, Saved, Transform};
use crate::checkpoint::names::canonical::Lie;
use crate::checkpoint::names::renames::SliceIndex;
use crate::plan::context::AdapterContext;
use crate::plan::draft::TensorChanges;
use crate::plan::name_map::{ParameterLocation, StoredSlice};
use crate::plan::update::{ExpertLayout, Slice, Update, UpdateKind};
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::TensorInfo;

/// Adds the updates of a module whose parameter the base stores in slices, or as rows of another
/// tensor; whether that is so.
///
/// # Errors
/// In words, what does not fit.
pub(in crate::plan) fn update(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    changes: &mut TensorChanges,
) -> Result<bool, String> {
    let TargetedModule { module, target } = targeted;
    if let Some(names) = &target.experts {
        return experts::update(adapter, targeted, names, changes).map(|()| true);
    }
    if !adapter.names.is_renamed() {
        return Ok(false);
    }
    let location = match adapter.names.locate(&target.parameter)? {
        None | Some(ParameterLocation::Tensor(_)) => return Ok(false),
        Some(location) => location,
    };
    let path = &module.path;
    if module.kind != LayerKind::Linear {
        return Err(format!(
            "its module {path} is no linear layer, and the base stores its weight in pieces; \
             merge with PEFT"
        ));
    }
    let context = adapter.plan;
    let kind = targeted.kind();
    refuse_subtracting(context, path, kind)?;
    if adapter.adapter.semantics().layer_replication.is_some() && context.is_for_peft() {
        return Err(format!(
            "its module {path} is in a layer that PEFT repeats, and the base stores its weight \
             in pieces or as a part of another; leave compat out"
        ));
    }
    if residual_of(adapter.adapter, targeted, None)?.is_some() {
        return Err(format!(
            "its module {path} began with components taken out of the base's weight \
             (init_lora_weights, kasa_config), which the base stores in pieces or as a part of \
             another; convert it in training"
        ));
    }
    let mut updates = Vec::new();
    for PlacedProduct { tensor, mut slice, transposed } in
        place_product(adapter, targeted, location)?
    {
        if !module.delta.holds_experts() {
            slice.expert = None;
        }
        if let Some(transform) = module.delta.transform() {
            check_piece(transform, &slice)
                .map_err(|problem| format!("its module {path} {problem} in {tensor}"))?;
        }
        let (rank, scale) = (targeted.rank(), targeted.scale());
        let own = adapter.update(module, kind);
        updates.push((tensor, Update { rank, scale, transposed, slice, ..own }));
    }
    if module.bias.is_some() {
        for PlacedBias { tensor, slice } in place_bias(adapter, module)? {
            let own = adapter.update(module, UpdateKind::Vector);
            updates.push((tensor, Update { rank: 1, scale: targeted.scale(), slice, ..own }));
        }
    }
    if module.delta.transform().is_some_and(Transform::changes_bias)
        && adapter.names.locate(&format!("{path}.bias"))?.is_some()
    {
        for PlacedBias { tensor, slice } in place_bias(adapter, module)? {
            let own = adapter.update(module, UpdateKind::Transform);
            updates.push((tensor, Update { rank: 1, scale: targeted.scale(), slice, ..own }));
        }
    }
    for (name, update) in updates {
        let tensor = context.source(&name).expect("one of the base's");
        quantized::refuse_unreadable(context, path, &name)?;
        refuse_integers(path, tensor)?;
        changes.entry(&name).updates.push(update);
    }
    Ok(true)
}

/// # Errors
/// In words, where what is made of a whole weight cannot be made of such a piece of it.
fn check_piece(transform: &dyn Transform, slice: &Slice) -> Result<(), String> {
    let is_whole = slice.inputs.is_none()
        && slice.outputs.as_ref().is_none_or(|outputs| transform.is_of_rows(outputs));
    match is_whole {
        true => Ok(()),
        false => Err(format!(
            "is made of more of a weight at once ({}) than the base stores",
            transform.name()
        )),
    }
}

/// Replaces the slices in which the base stores a parameter, or its rows of a tensor, by a saved one;
/// whether that is so.
///
/// # Errors
/// In words, what does not fit.
pub(in crate::plan) fn replace(
    adapter: &AdapterContext<'_>,
    saved: &Saved,
    changes: &mut TensorChanges,
) -> Result<bool, String> {
    if !adapter.names.is_renamed() {
        return Ok(false);
    }
    let location = match adapter.names.locate(&saved.path)? {
        None | Some(ParameterLocation::Tensor(_)) => return Ok(false),
        Some(location) => location,
    };
    let context = adapter.plan;
    for RowCopy { tensor: name, from, to } in row_copies(adapter, saved, location)? {
        let tensor = context.source(&name).expect("one of the base's");
        quantized::refuse_replacing(context, saved, &name)?;
        refuse_integers(&saved.path, tensor)?;
        if !fits(saved, tensor, &from, &to) {
            return Err(format!(
                "its tensor {} of shape {:?} does not fit {name} of shape {:?}, where \
                 the base stores a part of it or it is a part",
                saved.tensor.name, saved.tensor.shape, tensor.shape
            ));
        }
        let change = changes.entry(&name);
        change.updates.push(Update {
            slice: Slice { outputs: Some(from), rows: Some(to), ..Slice::default() },
            ..adapter.replacement(&saved.tensor.name, &saved.path)
        });
    }
    Ok(true)
}

/// Rows of a saved parameter, and those of a stored tensor whose place they take.
struct RowCopy {
    tensor: String,
    from: Range<u64>,
    to: Range<u64>,
}

/// The rows of a matrix, or of a stack of matrices taken as one.
fn rows_of(shape: &[u64]) -> u64 {
    shape.split_last().map_or(0, |(_, rows)| rows.iter().product())
}

/// The same of what may be a vector, which has rows of one element.
fn rows_or_elements(shape: &[u64]) -> u64 {
    if shape.len() == 1 { shape[0] } else { rows_of(shape) }
}

/// Where the rows of a saved parameter go.
fn row_copies(
    adapter: &AdapterContext<'_>,
    saved: &Saved,
    location: ParameterLocation,
) -> Result<Vec<RowCopy>, String> {
    let shape = &saved.tensor.shape;
    match location {
        ParameterLocation::Tensor(_) => Ok(Vec::new()),
        ParameterLocation::Otherwise { tensor, lie: Lie::HalvesSwapped } => {
            let copy = |(from, to)| RowCopy { tensor: tensor.clone(), from, to };
            Ok(swapped_halves(rows_or_elements(shape))?.into_iter().map(copy).collect())
        }
        ParameterLocation::Otherwise { tensor, .. } => Err(format!(
            "its tensor {} replaces {tensor}, which is its transpose in the base",
            saved.tensor.name
        )),
        ParameterLocation::Slices(slices) => {
            let height = slices.iter().map(|slice| slice.rows.end).max().unwrap_or(0);
            let experts = slices.iter().filter_map(|slice| slice.expert).next();
            let rows = height * experts.map_or(1, |expert| expert.count);
            if rows_or_elements(shape) != rows {
                return Err(format!(
                    "its tensor {} of shape {shape:?} replaces what the base stores in {} \
                     pieces, {rows} rows in all ({} and others)",
                    saved.tensor.name,
                    slices.len(),
                    slices[0].tensor
                ));
            }
            let copy = |slice: StoredSlice| {
                let first = slice.expert.map_or(0, |expert| expert.index * height);
                let (start, end) = (slice.rows.start, slice.rows.end);
                let (from, to) = (first + start..first + end, 0..end - start);
                RowCopy { tensor: slice.tensor, from, to }
            };
            Ok(slices.into_iter().map(copy).collect())
        }
        ParameterLocation::Rows { tensor, slice } => {
            let stored = &adapter.plan.source(&tensor).expect("one of the base's").shape;
            let (first, height) = match (stored.as_slice(), slice.expert) {
                (&[count, height, _], Some(expert)) if expert < count => (expert * height, height),
                (&[height, ..], None) => (0, height),
                _ => (0, 0),
            };
            let own = shape.first().copied().unwrap_or(0);
            let rows = rows_of_slice(adapter, &saved.path, &slice, height, own)?;
            let to = first + rows.start..first + rows.end;
            Ok(vec![RowCopy { tensor, from: 0..own, to }])
        }
    }
}

/// Whether rows of a saved parameter fit those of a stored tensor.
fn fits(saved: &Saved, stored: &TensorInfo, from: &Range<u64>, to: &Range<u64>) -> bool {
    let (own, stored) = (&saved.tensor.shape, &stored.shape);
    let same_width = match own.as_slice() {
        [] | [_] => stored.len() == 1,
        [.., width] => stored.len() > 1 && stored.last() == Some(width),
    };
    let within = from.end <= rows_or_elements(own) && to.end <= rows_or_elements(stored);
    let same_height = from.end - from.start == to.end - to.start;
    same_width && saved.tensor.dtype.is_mergeable() && within && same_height
}

/// Rows of a parameter, and those of the stored tensor that they go to.
type Moved = (Range<u64>, Range<u64>);

/// Where each half of that many rows goes, if the halves change places.
fn swapped_halves(rows: u64) -> Result<[Moved; 2], String> {
    let half = rows / 2;
    if half * 2 != rows {
        return Err(format!("has {rows} rows where two halves of equal size change places"));
    }
    Ok([(0..half, half..rows), (half..rows, 0..half)])
}

/// A slice of a module's product on a stored tensor, and whether it lies transposed there.
struct PlacedProduct {
    tensor: String,
    slice: Slice,
    transposed: bool,
}

/// The tensors that a module's product goes to.
fn place_product(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    location: ParameterLocation,
) -> Result<Vec<PlacedProduct>, String> {
    let TargetedModule { module, target } = targeted;
    // What a module of no product does not tell, the base does.
    let known = |(outputs, inputs): (u64, u64)| {
        let or = |own: u64, stored| if own == 0 { stored } else { own };
        (or(module.outputs(), outputs), or(module.inputs(), inputs))
    };
    match location {
        ParameterLocation::Tensor(tensor) => {
            Ok(vec![PlacedProduct { tensor, slice: Slice::default(), transposed: false }])
        }
        ParameterLocation::Otherwise { tensor, lie: Lie::HalvesSwapped } => {
            let columns = columns(adapter, &tensor);
            let rows = adapter.plan.source(&tensor).map_or(0, |found| rows_of(&found.shape));
            if known((rows, columns)) != (rows, columns) {
                return Err(misfit(module, &tensor, (rows, columns)));
            }
            let placed = |(from, to)| PlacedProduct {
                tensor: tensor.clone(),
                slice: Slice { outputs: Some(from), rows: Some(to), ..Slice::default() },
                transposed: false,
            };
            Ok(swapped_halves(rows)?.into_iter().map(placed).collect())
        }
        ParameterLocation::Otherwise { tensor, .. } => {
            let shape = adapter.plan.source(&tensor).map_or(&[][..], |found| &found.shape);
            let fits = matches!(*shape, [rows, columns]
                if known((columns, rows)) == (columns, rows));
            if !fits {
                let stored = (shape.first().copied().unwrap_or(0), columns(adapter, &tensor));
                return Err(misfit(module, &tensor, stored));
            }
            Ok(vec![PlacedProduct { tensor, slice: Slice::default(), transposed: true }])
        }
        ParameterLocation::Slices(slices) => {
            let transposed = target.layout == Some(ExpertLayout::Transposed);
            let rows = slices.iter().map(|slice| slice.rows.end).max().unwrap_or(0);
            let columns = columns(adapter, &slices[0].tensor);
            let extents = if transposed { (columns, rows) } else { (rows, columns) };
            if known(extents) != extents {
                return Err(misfit(module, &slices[0].tensor, (rows, columns)));
            }
            let placed = slices.into_iter().map(|stored| {
                let cut = (stored.rows != (0..rows)).then_some(stored.rows);
                let (outputs, inputs) = if transposed { (None, cut) } else { (cut, None) };
                let slice = Slice { expert: stored.expert, outputs, inputs, rows: None };
                PlacedProduct { tensor: stored.tensor, slice, transposed }
            });
            Ok(placed.collect())
        }
        ParameterLocation::Rows { tensor, slice } => {
            let matrix = matrix_of(adapter, &tensor, &slice, module)?;
            let within =
                rows_of_slice(adapter, &target.parameter, &slice, matrix.rows, module.outputs())?;
            let extents = (within.end - within.start, matrix.columns);
            let turned = (extents.1, extents.0);
            let orientation = if known(extents) == extents {
                Orientation::OutIn
            } else if slice.slots == 1 && known(turned) == turned {
                Orientation::InOut
            } else {
                return Err(misfit(module, &tensor, extents));
            };
            let rows = Some(matrix.first_row + within.start..matrix.first_row + within.end);
            let slice = Slice { rows, ..Slice::default() };
            let transposed = orientation == Orientation::InOut;
            Ok(vec![PlacedProduct { tensor, slice, transposed }])
        }
    }
}

/// A slice of a module's bias on a stored tensor.
struct PlacedBias {
    tensor: String,
    slice: Slice,
}

fn place_bias(adapter: &AdapterContext<'_>, module: &Module) -> Result<Vec<PlacedBias>, String> {
    let parameter = format!("{}.bias", module.path);
    let outputs = module.outputs();
    let placed = match adapter.names.locate(&parameter)? {
        None => Vec::new(),
        Some(ParameterLocation::Tensor(tensor)) => {
            vec![PlacedBias { tensor, slice: Slice::default() }]
        }
        Some(ParameterLocation::Otherwise { tensor, lie: Lie::HalvesSwapped }) => {
            let placed = |(from, to)| PlacedBias {
                tensor: tensor.clone(),
                slice: Slice { outputs: Some(from), rows: Some(to), ..Slice::default() },
            };
            swapped_halves(outputs)?.into_iter().map(placed).collect()
        }
        Some(ParameterLocation::Otherwise { .. }) => Vec::new(),
        Some(ParameterLocation::Slices(slices)) => {
            let end = slices.iter().map(|slice| slice.rows.end).max();
            let cut = |stored: StoredSlice| {
                let slice = Slice { outputs: Some(stored.rows), ..Slice::default() };
                PlacedBias { tensor: stored.tensor, slice }
            };
            match end {
                Some(end) if end == outputs => slices.into_iter().map(cut).collect(),
                _ => Vec::new(),
            }
        }
        Some(ParameterLocation::Rows { tensor, slice }) => {
            let height = adapter.plan.source(&tensor).map_or(0, |tensor| tensor.shape[0]);
            let rows = rows_of_slice(adapter, &parameter, &slice, height, outputs)?;
            vec![PlacedBias { tensor, slice: Slice { rows: Some(rows), ..Slice::default() } }]
        }
    };
    let fits = |PlacedBias { tensor, slice }: &PlacedBias| {
        let shape = &adapter.plan.source(tensor).expect("one of the base's").shape;
        shape.len() == 1 && (!slice.is_whole() || shape[0] == outputs)
    };
    if placed.is_empty() || !placed.iter().all(fits) {
        return Err(format!(
            "its module {} has a bias on lora_B, but the base has no {parameter} of its size",
            module.path
        ));
    }
    Ok(placed)
}

/// The number of inputs of a stored matrix.
fn columns(adapter: &AdapterContext<'_>, tensor: &str) -> u64 {
    let shape = adapter.plan.source(tensor).map_or(&[][..], |tensor| &tensor.shape);
    shape.iter().skip(1).product()
}

/// A matrix of a stored tensor: the whole of it, or one expert's.
struct StoredMatrix {
    first_row: u64,
    rows: u64,
    columns: u64,
}

/// The matrix in which a slice's rows lie.
fn matrix_of(
    adapter: &AdapterContext<'_>,
    tensor: &str,
    slice: &SliceIndex,
    module: &Module,
) -> Result<StoredMatrix, String> {
    let shape = adapter.plan.source(tensor).map_or(&[][..], |tensor| &tensor.shape);
    match (shape, slice.expert) {
        (&[rows, columns], None) => Ok(StoredMatrix { first_row: 0, rows, columns }),
        (&[count, rows, columns], Some(expert)) if expert < count => {
            Ok(StoredMatrix { first_row: expert * rows, rows, columns })
        }
        _ => Err(format!(
            "its module {} is a part of {tensor}, which has shape {shape:?} in the base",
            module.path
        )),
    }
}

/// The rows of a slice in a matrix of that height, in which its parameter's slices lie below one
/// another; the slice has that many outputs.
fn rows_of_slice(
    adapter: &AdapterContext<'_>,
    parameter: &str,
    slice: &SliceIndex,
    height: u64,
    outputs: u64,
) -> Result<Range<u64>, String> {
    let slots = slice.slots as u64;
    let slot = slice.slot as u64;
    if slots == 1 {
        return Ok(0..height);
    }
    if slice.are_equal() || outputs * slots == height {
        return Ok(slot * height / slots..(slot + 1) * height / slots);
    }
    // Slices of several sizes: the adapter's own modules have them, if it has all of them.
    let mut heights = adapter.names.own_heights(adapter.adapter, parameter, slice.slots);
    if !slice.alike.is_empty() {
        heights[slice.slot] = Some(outputs).filter(|outputs| *outputs > 0);
        let alike = heights[slice.alike.clone()].iter().copied().flatten().next();
        heights[slice.alike.clone()].fill(alike);
        if let Some(rows) = rows_of_some(&heights, slice.slot, height) {
            return Ok(rows);
        }
    }
    match heights.into_iter().collect::<Option<Vec<_>>>() {
        Some(heights) if heights.iter().sum::<u64>() == height => {
            let start = heights[..slice.slot].iter().sum::<u64>();
            Ok(start..start + heights[slice.slot])
        }
        _ => Err(format!(
            "its {parameter} is one of {slots} parts of {height} rows in the base, and nothing \
             tells the sizes of the others; merge with PEFT"
        )),
    }
}

/// The rows of a part of which the size is known, where those of all parts before it are, or of all
/// parts behind it.
fn rows_of_some(heights: &[Option<u64>], slot: usize, height: u64) -> Option<Range<u64>> {
    let own = heights[slot]?;
    let sum = |parts: &[Option<u64>]| parts.iter().copied().sum::<Option<u64>>();
    let start = match (sum(heights), sum(&heights[..slot]), sum(&heights[slot..])) {
        (Some(all), ..) if all != height => return None,
        (_, Some(before), _) => before,
        (_, _, Some(from)) => height.checked_sub(from)?,
        _ => return None,
    };
    (start + own <= height).then_some(start..start + own)
}

fn misfit(module: &Module, tensor: &str, (rows, columns): (u64, u64)) -> String {
    format!(
        "its module {} updates a weight of shape [{}, {}], but in the base, where it belongs to \
         {tensor}, it has shape [{rows}, {columns}]",
        module.path,
        module.outputs(),
        module.inputs()
    )
}

mod experts;
#[cfg(test)]
mod tests;
