//! LoHa, LoKr and IA3 for a target that has them as methods of whole adapters (PEFT's): kept where one
//! config describes all modules, made plain where none does.

use std::path::Path;

use super::modules::{self, Converted};
use crate::adapter::Module;
use crate::adapter::formats::parts::{self, DefaultScale, Hadamard, Kronecker, ModuleParts, Part};
use crate::adapter::formats::{parts::ScaleRule, peft};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// Whether a module is of a method that a whole adapter can be of.
pub(super) fn is_of_method(module: &Module) -> bool {
    let tensors = module.delta.tensors();
    let is_of = |(_, tensor): &(&str, &Tensor)| {
        let part = parts::split(&tensor.name).map(|(_, part, _)| part);
        matches!(part, Some(Part::Hadamard(_) | Part::Kronecker(_) | Part::Ia3))
    };
    module.magnitudes().is_none() && module.bias.is_none() && tensors.iter().all(is_of)
}

/// Makes modules plain where no config describes them as they are, and says why; none where one does.
///
/// # Errors
/// As [`modules::plain`].
pub(super) fn settled(
    converted: &mut [Converted],
    knows_kernels: bool,
    path: &Path,
) -> Result<Option<String>> {
    let all = converted.iter().map(|one| &one.module);
    let Err(why) = peft::check_method(all, knows_kernels) else { return Ok(None) };
    for one in converted {
        one.module = modules::plain(&one.module, path)?;
    }
    Ok(Some(format!("{why}; it was written as plain factors")))
}

/// The modules whose factors have a kernel's extents taken together, with those that the base has.
///
/// # Errors
/// [`crate::Error::Adapter`] if the factors do not fit them.
pub(super) fn with_kernels(
    converted: &mut [Converted],
    base: &Checkpoint,
    names: Option<&DiffusionNames>,
) -> Result<()> {
    for one in converted {
        let module = &one.module;
        if !module.delta.may_flatten_kernel() || !is_of_method(module) {
            continue;
        }
        let Some(inputs) = inputs_in(base, names, module) else { continue };
        if let Some(found) = with_kernel(module, &inputs[1..])? {
            one.module = found;
        }
    }
    Ok(())
}

/// The inputs and the kernel of the convolution that a module changes, where the base tells that it is one.
pub(super) fn inputs_in(
    base: &Checkpoint,
    names: Option<&DiffusionNames>,
    module: &Module,
) -> Option<Vec<u64>> {
    let own = format!("{}.weight", module.path);
    let canonical = || names.and_then(|names| names.canonical(&own));
    let stored = base.tensor(&own);
    let stored = stored.or_else(|| canonical().and_then(|found| base.tensor(&found.name)))?;
    let [outputs, inputs @ ..] = stored.shape.as_slice() else { return None };
    let fits = *outputs == module.outputs()
        && inputs.iter().product::<u64>() == module.inputs()
        && inputs.len() > 1;
    fits.then(|| inputs.to_vec())
}

fn with_kernel(module: &Module, kernel: &[u64]) -> Result<Option<Module>> {
    let size: u64 = kernel.iter().product();
    let mut parts = ModuleParts::default();
    for (_, tensor) in module.delta.tensors() {
        let Some((_, part, _)) = parts::split(&tensor.name) else { return Ok(None) };
        let mut info = tensor.info().clone();
        let is_wide = matches!(
            part,
            Part::Hadamard(Hadamard::W1B | Hadamard::W2B)
                | Part::Kronecker(Kronecker::W2 | Kronecker::W2B)
        );
        if is_wide {
            let width = info.shape[1..].iter().product::<u64>();
            if !width.is_multiple_of(size) {
                return Ok(None);
            }
            info.shape = [&[info.shape[0], width / size], kernel].concat();
        }
        parts.add(part, Tensor::new(tensor.file().clone(), info))?;
    }
    let (scaling, alpha) = (module.scaling, module.alpha);
    let default = DefaultScale::Factor { scaling, alpha };
    let rule = ScaleRule { default, scales_whole_factors: true };
    let made = parts.module(&module.key, &module.path, &rule)?;
    Ok(made.into_iter().next().map(|made| Module {
        delta: made.delta,
        kind: made.kind,
        ..module.clone()
    }))
}
