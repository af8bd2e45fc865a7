//! The pass over modules: the updates of the tensors that an adapter's modules change.

use indexmap::IndexMap;

use super::checks::{refuse_integers, refuse_subtracting, residual_of};
use super::targets::{self, Target, TargetedModule};
use super::{quantized, replication, slices, ties};
use crate::adapter::{Adapter, LayerKind, Module, Transform};
use crate::checkpoint::names::orientation;
use crate::error::Result;
use crate::limits;
use crate::plan::context::{AdapterContext, Context};
use crate::plan::draft::PlanDraft;
use crate::plan::update::{ExpertLayout, Update, UpdateKind};
use crate::tensor::orientation::Orientation;

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
                let (path, noun) = (&module.path, adapter.plan.base.noun());
                let problem = format!("{label}: its module {path} fits no tensor of the {noun}");
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
        None => {
            let orientation = orientation_on(context, adapter.adapter, module, &shape)?;
            (orientation, targets::changed_slices(module, &shape, orientation))
        }
    };
    let residual = residual_of(adapter.adapter, targeted, Some(&shape))?;
    let kind = targeted.kind();
    refuse_subtracting(context, path, kind)?;
    if module.bias.is_some() {
        add_bias(adapter, targeted, draft)?;
    }
    if module.delta.transform().is_some_and(Transform::changes_bias) {
        transform_bias(adapter, targeted, draft)?;
    }
    let mut names = ties::updated_by(context, path, name, draft.is_untied)?;
    if context.is_for_peft() {
        // PEFT's repeated layers share their weights.
        let shared = replication::sharing(context.base, name);
        if shared.len() > 1 && matches!(kind, UpdateKind::Dora | UpdateKind::Transform) {
            return Err(format!(
                "its module {path} is rescaled or turned in a layer that PEFT repeats, and what \
                 PEFT makes of that depends on the order of its modules; leave compat out"
            ));
        }
        names.extend(shared.into_iter().filter(|other| other != name));
    }
    let are_experts = target.layout.is_some() && slices.len() > 1;
    if are_experts && !draft.experts.add(slices.len() * names.len()) {
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
        ..adapter.update(module, kind)
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
    let update =
        Update { rank: 1, scale: targeted.scale(), ..adapter.update(module, UpdateKind::Vector) };
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

/// Adds the update of the layer's bias, where it has one, that is changed as the weight is.
fn transform_bias(
    adapter: &AdapterContext<'_>,
    targeted: TargetedModule<'_>,
    draft: &mut PlanDraft,
) -> Result<(), String> {
    let module = targeted.module;
    let bias = format!("{}.bias", module.path);
    let name = adapter.names.apply(&bias)?.unwrap_or(bias);
    let Some(bias) = adapter.plan.base.tensor(&name) else { return Ok(()) };
    refuse_integers(&module.path, bias)?;
    if bias.shape != [module.outputs()] {
        return Err(format!(
            "its module {} scales {} outputs, but {name} has shape {:?}",
            module.path,
            module.outputs(),
            bias.shape
        ));
    }
    let scale = targeted.scale();
    let update = adapter.update(module, UpdateKind::Transform);
    draft.changes.entry(&name).updates.push(Update { rank: 1, scale, ..update });
    Ok(())
}

/// The extents of a product on a weight of that shape, where its module tells only one of them: a
/// number of inputs or outputs of 0 is not known.
fn known_extents(module: &Module, shape: &[u64]) -> (u64, u64) {
    let (outputs, inputs) = (module.outputs(), module.inputs());
    let rest = shape.iter().skip(1).product();
    match (outputs, inputs, shape) {
        (0, 0, [first, ..]) => (*first, rest),
        (0, inputs, [first, _, ..]) if rest == inputs && shape.len() > 2 => (*first, rest),
        (0, inputs, [first, second, ..]) => match (*second == inputs, *first == inputs) {
            (false, true) if shape.len() == 2 => (*second, inputs),
            (true, _) => (*first, rest),
            _ => (0, inputs),
        },
        (outputs, 0, [first, ..]) => match (*first == outputs, shape) {
            (false, [first, second]) if *second == outputs => (outputs, *first),
            _ => (outputs, rest),
        },
        _ => (outputs, inputs),
    }
}

/// A kernel's extents without the ones that it ends with.
fn without_ones(kernel: &[u64]) -> &[u64] {
    let kept = kernel.iter().rposition(|extent| *extent != 1).map_or(0, |last| last + 1);
    &kernel[..kept.max(kernel.len().min(1))]
}

/// Which way a module's product lies on a weight of that shape.
fn orientation_on(
    context: &Context<'_>,
    adapter: &Adapter,
    module: &Module,
    shape: &[u64],
) -> Result<Orientation, String> {
    let path = &module.path;
    if (module.outputs(), module.inputs(), shape.len()) == (0, 0, 2) {
        // As of a square weight, for nothing but the architecture tells.
        let flag = adapter.semantics().stored_transposed;
        return orientation::decide_square(context.base, path, flag);
    }
    let extents @ (outputs, inputs) = known_extents(module, shape);
    let kernel = module.delta.input_shape();
    let is_flat = !module.delta.has_product()
        || module.kind == LayerKind::Linear
            && (module.delta.may_flatten_kernel()
                || without_ones(&shape[shape.len().min(1)..]).len() == 1);
    if is_flat && shape.len() > 2 && extents == (shape[0], shape[1..].iter().product()) {
        return Ok(Orientation::OutIn);
    }
    match module.kind {
        LayerKind::Linear => {
            let flag = adapter.semantics().stored_transposed;
            orientation::decide(context.base, path, shape, extents, flag)
        }
        LayerKind::Embedding if module.delta.is_by_tokens() => match shape == [outputs, inputs] {
            true => Ok(Orientation::OutIn),
            false => Err(format!(
                "its module {path} updates an embedding of shape [{outputs}, {inputs}], but the \
                 base's is {shape:?}"
            )),
        },
        // Stored (tokens, width): the product's transpose.
        LayerKind::Embedding if shape == [inputs, outputs] => Ok(Orientation::InOut),
        LayerKind::Embedding => Err(format!(
            "its module {path} updates an embedding of shape [{inputs}, {outputs}], \
             but the base's is {shape:?}"
        )),
        LayerKind::Convolution
            if shape.first() == Some(&outputs)
                && without_ones(&shape[1..]) == without_ones(&kernel) =>
        {
            Ok(Orientation::OutIn)
        }
        LayerKind::Norm | LayerKind::Bias if shape == [outputs] => Ok(Orientation::OutIn),
        LayerKind::Norm | LayerKind::Bias => Err(format!(
            "its {} adds {outputs} values to what has shape {shape:?} in the base",
            module.title()
        )),
        LayerKind::Convolution => Err(format!(
            "its module {path} updates a convolution of shape [{outputs}, {}], but the base's is \
             {shape:?} (a convolution in groups has no LoRA that can be merged)",
            kernel.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
        )),
    }
}
