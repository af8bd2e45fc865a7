//! The pass over modules: the updates of the tensors that an adapter's modules change.

use indexmap::IndexMap;

use super::targets::{self, Target, TargetedModule};
use super::undo::GIVE_THE_BASE;
use super::{quantized, replication, slices, ties};
use crate::adapter::{Adapter, Initialization, LayerKind, Module};
use crate::checkpoint::names::orientation;
use crate::error::Result;
use crate::limits;
use crate::plan::context::{AdapterContext, Context};
use crate::plan::draft::PlanDraft;
use crate::plan::update::{ExpertLayout, Residual, Slice, Update, UpdateKind};
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::TensorInfo;

/// Adds the updates of all of an adapter's modules; how many weights lie the other way than the
/// adapter says. `is_mapped` tells that every target's name fits, so that one that does not is not
/// among the problems yet.
///
/// # Errors
/// [`crate::Error::Cancelled`]. What does not fit is among the problems.
pub(in crate::plan) fn add(
    adapter: &AdapterContext<'_>,
    targets: &IndexMap<String, Target>,
    is_mapped: bool,
    draft: &mut PlanDraft,
) -> Result<usize> {
    let label = adapter.label();
    let mut against_flag = 0;
    for (key, target) in targets {
        adapter.plan.task.check()?;
        let module = &adapter.adapter.modules()[key];
        let targeted = TargetedModule { module, target };
        let added = slices::update(adapter, targeted, &mut draft.changes);
        if draft.messages.keep(&label, added)? != Some(false) {
            continue;
        }
        let name = adapter.tensor_name(&target.parameter);
        let Some(name) = draft.messages.keep(&label, name)? else { continue };
        if adapter.plan.source(&name).is_none() {
            if is_mapped {
                let path = &module.path;
                let problem = format!("{label}: its module {path} fits no tensor of the base");
                draft.messages.problem(problem);
            }
            continue;
        }
        let orientation = update(adapter, targeted, &name, draft);
        if let Some(orientation) = draft.messages.keep(&label, orientation)? {
            let is_transposed = orientation == Orientation::InOut;
            let counts = module.kind == LayerKind::Linear
                && module.parameters.is_empty()
                && is_transposed != adapter.adapter.semantics().stored_transposed;
            against_flag += usize::from(counts);
        }
    }
    Ok(against_flag)
}

/// Adds the updates of one module whose parameter is one tensor; which way the product lies on it.
fn update(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    name: &str,
    draft: &mut PlanDraft,
) -> Result<Orientation, String> {
    let context = adapter.plan;
    let TargetedModule { module, target } = targeted;
    let path = &module.path;
    let tensor = context.source(name).expect("the caller found it");
    quantized::refuse_unreadable(context, path, name)?;
    refuse_integers(path, tensor)?;
    // An adapter's own tensor in the base's place may have another shape.
    let shape = match draft.changes.origin(name) {
        Some(origin) if origin.adapter == adapter.position => origin.info.shape.clone(),
        Some(origin) if origin.info.shape != tensor.shape => {
            return Err(format!(
                "its module {path} updates {name}, of which an earlier adapter changed the \
                 number of tokens; merge the one, and this one into what comes of it"
            ));
        }
        _ => tensor.shape.clone(),
    };
    let (orientation, slices) = match target.layout {
        Some(ExpertLayout::Straight) => {
            (Orientation::OutIn, targets::expert_slices(module, &shape))
        }
        Some(ExpertLayout::Transposed) => {
            (Orientation::InOut, targets::expert_slices(module, &shape))
        }
        None => (orientation_on(context, adapter.adapter, module, &shape)?, vec![Slice::default()]),
    };
    let residual = residual(adapter.adapter, targeted, Some(&shape))?;
    let kind = targeted.kind();
    refuse_subtracting(context, path, kind)?;
    if module.bias.is_some() {
        add_bias(adapter, targeted, draft)?;
    }
    let mut names = ties::updated_by(context, path, name, draft.is_untied)?;
    if context.is_for_peft() {
        // PEFT's repeated layers share their weights.
        let shared = replication::sharing(context.base, name);
        if shared.len() > 1 && kind == UpdateKind::Dora {
            return Err(format!(
                "its module {path} is rescaled by DoRA in a layer that PEFT repeats, and what \
                 PEFT makes of that depends on the order of its modules; leave compat out"
            ));
        }
        names.extend(shared.into_iter().filter(|other| other != name));
    }
    if slices.len() > 1 && !draft.experts.add(slices.len() * names.len()) {
        return Err(format!(
            "its module {path} changes {} experts, and with those before it more than {} \
             are changed, which is more than a model has",
            slices.len(),
            limits::UPDATES_OF_EXPERTS
        ));
    }
    let product = Update {
        rank: targeted.rank(),
        scale: targeted.scale(),
        transposed: orientation == Orientation::InOut,
        residual,
        ..adapter.update(&module.key, kind)
    };
    for name in names {
        let slices = slices.iter().cloned();
        let updates = slices.map(|slice| Update { slice, ..product.clone() });
        draft.changes.entry(&name).updates.extend(updates);
    }
    Ok(orientation)
}

/// Adds the update of the layer's bias, which the bias on a module's B makes.
fn add_bias(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    draft: &mut PlanDraft,
) -> Result<(), String> {
    let context = adapter.plan;
    let module = targeted.module;
    let path = &module.path;
    let bias = format!("{path}.bias");
    let name = adapter.names.apply(&bias)?.unwrap_or(bias);
    let bias = context.base.tensor(&name).ok_or_else(|| {
        format!("its module {path} has a bias on lora_B, but the base has no {name}")
    })?;
    refuse_integers(path, bias)?;
    if bias.shape != [module.outputs()] {
        let outputs = module.outputs();
        return Err(format!(
            "its module {path} adds {outputs} values to {name}, which has shape {:?}",
            bias.shape
        ));
    }
    let update = Update {
        rank: 1,
        scale: targeted.scale(),
        ..adapter.update(&module.key, UpdateKind::Vector)
    };
    let names = if context.is_for_peft() {
        // PEFT's repeated layers share their biases as well.
        replication::sharing(context.base, &name)
    } else {
        [name].into()
    };
    for name in names {
        draft.changes.entry(&name).updates.push(update.clone());
    }
    Ok(())
}

/// What the adapter's initialisation took out of a module's weight, of that shape where it is one
/// tensor.
///
/// # Errors
/// In words, where that is not known.
pub(super) fn residual(
    adapter: &Adapter,
    targeted: TargetedModule<'_>,
    shape: Option<&[u64]>,
) -> Result<Option<Residual>, String> {
    let TargetedModule { module, target } = targeted;
    let path = &module.path;
    let residual = match adapter.semantics().initialization {
        Initialization::Smallest => Residual::Smallest,
        Initialization::Largest { .. } => Residual::Largest,
        Initialization::Leading => Residual::Leading,
        Initialization::Plain | Initialization::Unknown => return Ok(None),
    };
    let is_linear = module.kind == LayerKind::Linear;
    let is_layer = is_linear && target.layout.is_none() && target.parameter.ends_with(".weight");
    if !is_layer || !module.delta.is_low_rank() || targeted.repeats() != 1.0 {
        return Err(format!(
            "its module {path} is no plain linear layer, and how its initialisation changed \
             the base is not known (init_lora_weights, kasa_config); convert it in training"
        ));
    }
    if let (Residual::Smallest, Some(shape)) = (residual, shape)
        && shape.iter().any(|extent| target.rank >= *extent)
    {
        return Err(format!(
            "its module {path} of rank {} leaves nothing of a weight of shape {shape:?}, whose \
             smallest singular components KaSA takes out (kasa_config)",
            target.rank
        ));
    }
    Ok(Some(residual))
}

/// # Errors
/// In words, what cannot be taken out of a merged model again.
pub(super) fn refuse_subtracting(
    context: &Context<'_>,
    path: &str,
    kind: UpdateKind,
) -> Result<(), String> {
    if context.options.subtract && kind == UpdateKind::Dora {
        return Err(format!(
            "its module {path} is rescaled by DoRA, and the norms by which its rows were divided \
             are in neither the merged model nor the adapter; {GIVE_THE_BASE}"
        ));
    }
    Ok(())
}

/// # Errors
/// In words, where a weight is stored as integers.
pub(super) fn refuse_integers(path: &str, tensor: &TensorInfo) -> Result<(), String> {
    if tensor.dtype.is_mergeable() {
        return Ok(());
    }
    Err(format!(
        "its module {path} updates {}, which the base stores as {}: \
         merge into the unquantised base instead",
        tensor.name, tensor.dtype
    ))
}

/// Which way a module's product lies on a weight of that shape.
fn orientation_on(
    context: &Context<'_>,
    adapter: &Adapter,
    module: &Module,
    shape: &[u64],
) -> Result<Orientation, String> {
    let path = &module.path;
    let extents @ (outputs, inputs) = (module.outputs(), module.inputs());
    let kernel = module.delta.input_shape();
    match module.kind {
        LayerKind::Linear => {
            let flag = adapter.semantics().stored_transposed;
            orientation::decide(context.base, path, shape, extents, flag)
        }
        // Stored (tokens, width): the product's transpose.
        LayerKind::Embedding if shape == [inputs, outputs] => Ok(Orientation::InOut),
        LayerKind::Embedding => Err(format!(
            "its module {path} updates an embedding of shape [{inputs}, {outputs}], \
             but the base's is {shape:?}"
        )),
        LayerKind::Convolution if shape.first() == Some(&outputs) && shape[1..] == kernel[..] => {
            Ok(Orientation::OutIn)
        }
        LayerKind::Convolution => Err(format!(
            "its module {path} updates a convolution of shape [{outputs}, {}], but the base's is \
             {shape:?} (a convolution in groups has no LoRA that can be merged)",
            kernel.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
        )),
    }
}
