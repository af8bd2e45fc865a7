//! Checks of single modules, which several passes share.

use super::targets::TargetedModule;
use super::undo::GIVE_THE_BASE;
use crate::adapter::{Adapter, Initialization, LayerKind};
use crate::plan::context::Context;
use crate::plan::update::{Residual, UpdateKind};
use crate::tensor::safetensors::TensorInfo;

/// What the adapter's initialisation took out of a module's weight, of that shape where it is one
/// tensor.
///
/// # Errors
/// In words, where that is not known.
pub(super) fn residual_of(
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
    if !is_layer || !module.delta.is_low_rank() || targeted.module.repeats() != 1.0 {
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
    if context.options.subtract && kind == UpdateKind::Transform {
        return Err(format!(
            "its module {path} is made of the whole of the base's weight, which is in neither the \
             merged model nor the adapter; {GIVE_THE_BASE}"
        ));
    }
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
