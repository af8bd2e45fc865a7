//! The updates of experts that each have a parameter of their own in the base, or rows of one, by a
//! module that holds the factors of all of them.

use std::ops::Range;

use super::{StoredMatrix, matrix_of, misfit, rows_of_slice};
use crate::adapter::Expert;
use crate::plan::context::AdapterContext;
use crate::plan::draft::TensorChanges;
use crate::plan::name_map::ParameterLocation;
use crate::plan::passes::checks::{refuse_integers, refuse_subtracting, residual_of};
use crate::plan::passes::quantized;
use crate::plan::passes::targets::{ExpertNames, TargetedModule};
use crate::plan::update::{Slice, Update};

/// Adds an update for each expert.
///
/// # Errors
/// In words, what does not fit.
pub(super) fn update(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    names: &ExpertNames,
    changes: &mut TensorChanges,
) -> Result<(), String> {
    let TargetedModule { module, .. } = targeted;
    let context = adapter.plan;
    let path = &module.key;
    let kind = targeted.kind();
    refuse_subtracting(context, path, kind)?;
    residual_of(adapter.adapter, targeted, None)?;
    if adapter.adapter.semantics().layer_replication.is_some() && context.is_for_peft() {
        return Err(format!(
            "its module {path} is in a layer that PEFT repeats, and the base stores its experts one \
             by one; leave compat out"
        ));
    }
    let (outputs, inputs) = (module.outputs(), module.inputs());
    let count = module.products().count() as u64;
    let of_another = |more: &str| {
        format!(
            "its module {path} has factors of {count} experts, but the base has {more}; it was \
             trained on another model"
        )
    };
    for index in 0..count {
        let Some(place) = place(adapter, targeted, names, index)? else {
            return Err(of_another(&format!("no {}", names.parameter(index))));
        };
        let Place { tensor, rows, extents, experts } = place;
        if experts.is_some_and(|experts| experts != count) {
            return Err(of_another(&format!("{} in {tensor}", experts.unwrap_or_default())));
        }
        let transposed = extents != (outputs, inputs);
        // Only a tensor of an expert's own can lie the other way.
        if transposed && (experts.is_some() || extents != (inputs, outputs)) {
            return Err(misfit(module, &tensor, extents));
        }
        let stored = context.source(&tensor).expect("one of the base's");
        quantized::refuse_unreadable(context, path, &tensor)?;
        refuse_integers(path, stored)?;
        let slice = Slice { expert: Some(Expert { index, count }), rows, ..Slice::default() };
        let (rank, scale) = (targeted.rank(), targeted.scale());
        let own = adapter.update(module, kind);
        let update = Update { rank, scale, transposed, slice, ..own };
        changes.entry(&tensor).updates.push(update);
    }
    match place(adapter, targeted, names, count) {
        Ok(Some(next)) if next.experts.is_none() => Err(of_another("more")),
        _ => Ok(()),
    }
}

/// Where an expert's matrix lies.
struct Place {
    tensor: String,
    /// The rows that it has of the tensor; all of it, if none.
    rows: Option<Range<u64>>,
    extents: (u64, u64),
    /// How many experts lie in the tensor, where it is that of all.
    experts: Option<u64>,
}

fn place(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    names: &ExpertNames,
    index: u64,
) -> Result<Option<Place>, String> {
    let context = adapter.plan;
    let parameter = &names.parameter(index);
    let location = match names.slice(index) {
        Some(slice) => {
            adapter.names.apply(parameter)?.map(|tensor| ParameterLocation::Rows { tensor, slice })
        }
        None if adapter.names.is_renamed() => adapter.names.locate(parameter)?,
        None => adapter.names.apply(parameter)?.map(ParameterLocation::Tensor),
    };
    match location {
        None => Ok(None),
        Some(ParameterLocation::Tensor(tensor)) => {
            let Some(stored) = context.source(&tensor) else { return Ok(None) };
            let [rows, columns] = *stored.shape else {
                return Err(misfit(targeted.module, &tensor, (0, 0)));
            };
            Ok(Some(Place { tensor, rows: None, extents: (rows, columns), experts: None }))
        }
        Some(ParameterLocation::Rows { tensor, slice }) => {
            let StoredMatrix { first_row, rows: height, columns } =
                matrix_of(adapter, &tensor, &slice, targeted.module)?;
            let outputs = targeted.module.outputs();
            let within = rows_of_slice(adapter, parameter, &slice, height, outputs)?;
            let experts = context.source(&tensor).map(|stored| stored.shape[0]);
            let extents = (within.end - within.start, columns);
            let rows = Some(first_row + within.start..first_row + within.end);
            Ok(Some(Place { tensor, rows, extents, experts }))
        }
        Some(ParameterLocation::Slices(_) | ParameterLocation::Otherwise { .. }) => {
            Err(format!("its {parameter} is stored in pieces in the base; merge with PEFT"))
        }
    }
}
