//! Where the modules of a diffusion model go in another naming: renamed, cut into parts, or joined.

use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::canonical::Lie;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::{Error, Result};

/// A naming of a diffusion model's modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// diffusers', with q, k and v apart.
    Diffusers,
    /// The author's.
    Original,
    /// That in the layer in which Flux's authors fuse q, k, v and an MLP, of q, k and v alone, as XLabs'
    /// trainer has it.
    WithoutMlp,
}

/// The parts q, k and v of a fused layer.
pub(super) const ATTENTION: usize = 3;

/// Where a module goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Goal {
    /// To a module of that full name.
    Whole { name: String, lie: Lie },
    /// To several, each with these rows.
    Parts(Vec<(String, Range<u64>)>),
    /// To a part of one of that full name, of which all parts have so many rows.
    Part { name: String, slot: usize, heights: Vec<u64> },
}

/// Where a module of that full name goes, whose product has so many outputs.
///
/// # Errors
/// [`Error::Unsupported`] where nothing tells how many rows the parts have.
pub(super) fn goal(
    names: &DiffusionNames,
    base: &Checkpoint,
    path: &str,
    naming: Naming,
    outputs: u64,
) -> Result<Goal> {
    let whole = |parameter: &str, lie| Goal::Whole { name: module_of(parameter), lie };
    let own = format!("{path}.weight");
    let Some(canonical) = names.canonical(&own) else { return Ok(whole(&own, Lie::Same)) };
    let original = canonical.name.as_str();
    let parts = names.diffusers_names(original);
    let is_original = own == *original && canonical.slice.is_none();
    let has_mlp = naming == Naming::WithoutMlp && parts.len() > ATTENTION;
    match naming {
        Naming::WithoutMlp if has_mlp && canonical.slice.is_none() => {
            let heights = heights(base, original, parts, None)?;
            Ok(Goal::Parts(vec![(module_of(original), 0..heights[..ATTENTION].iter().sum())]))
        }
        Naming::Original | Naming::WithoutMlp => match &canonical.slice {
            None => Ok(whole(original, canonical.lie)),
            Some(slice) => {
                let mut heights = heights(base, original, parts, Some((slice.slot, outputs)))?;
                heights.truncate(if has_mlp { ATTENTION } else { heights.len() });
                Ok(Goal::Part { name: module_of(original), slot: slice.slot, heights })
            }
        },
        Naming::Diffusers if !is_original => Ok(whole(&own, Lie::Same)),
        Naming::Diffusers => match parts {
            [] => Ok(whole(&own, Lie::Same)),
            [Some(only)] => {
                let lie = names.canonical(only).map_or(Lie::Same, |found| found.lie);
                Ok(whole(only, lie))
            }
            parts => {
                let heights = heights(base, original, parts, None)?;
                let mut start = 0;
                let mut goals = Vec::new();
                for (part, height) in parts.iter().zip(heights) {
                    let Some(part) = part else { return Err(unknown(base, original)) };
                    goals.push((module_of(part), start..start + height));
                    start += height;
                }
                Ok(Goal::Parts(goals))
            }
        },
    }
}

fn module_of(parameter: &str) -> String {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module).to_owned()
}

fn unknown(base: &Checkpoint, original: &str) -> Error {
    Error::unsupported(
        base.path(),
        format!(
            "does not tell how many rows each part of {original} has; give a base in diffusers' names"
        ),
    )
}

/// The rows of each part of a parameter of the author's: those of the base's tensors, where it stores
/// the parts; else by the rule that q has as many rows as the layer has inputs, as k and v have where
/// an MLP's first layer follows them.
fn heights(
    base: &Checkpoint,
    original: &str,
    parts: &[Option<String>],
    known: Option<(usize, u64)>,
) -> Result<Vec<u64>> {
    let stored = |part: &Option<String>| Some(base.tensor(part.as_deref()?)?.shape[0]);
    let mut found: Vec<Option<u64>> = parts.iter().map(stored).collect();
    if let Some((slot, rows)) = known {
        found[slot] = Some(rows);
    }
    if let Some(shape) = base.tensor(original).map(|tensor| &tensor.shape) {
        let (all, inputs) = (shape[0], shape[1..].iter().product::<u64>());
        let by_rule = match parts.len() {
            2 => vec![all / 2; 2],
            3 => vec![inputs, all.saturating_sub(inputs) / 2, all.saturating_sub(inputs) / 2],
            _ => vec![inputs, inputs, inputs, all.saturating_sub(3 * inputs)],
        };
        let agrees =
            found.iter().zip(&by_rule).all(|(one, rule)| one.is_none_or(|one| one == *rule));
        if by_rule.iter().sum::<u64>() != all || by_rule.contains(&0) || !agrees {
            return Err(unknown(base, original));
        }
        return Ok(by_rule);
    }
    found.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| unknown(base, original))
}
