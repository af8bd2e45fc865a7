//! How far the updates of a written adapter are from those that it was made from.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

use super::modules::{Converted, Origin};
use super::on_base::{Errors, Sums};
use crate::adapter::factors::values;
use crate::adapter::{Adapter, Module};
use crate::error::{Error, Result};
use crate::measure::overlap::difference_norm;
use crate::measure::products::Product;
use crate::measure::spectrum::frobenius_norm;
use crate::parallel::task::Task;
use crate::tensor::safetensors::Tensor;

/// How far a written adapter is from what it was made from.
pub(super) struct Difference {
    /// The largest of ‖ΔW − ΔW′‖/‖ΔW‖ over the modules, in the Frobenius norm.
    pub largest: f64,
    /// Why magnitudes of DoRA and the products beside them were measured apart, where they were.
    pub apart: Option<String>,
}

/// What tells the errors of modules whose updates only the base makes, by their keys.
pub(super) type OnBaseOf<'a> = dyn Fn(&HashSet<&str>) -> Result<Errors> + 'a;

/// Holds a written adapter against what it was made from. What was copied byte for byte has no error.
/// DoRA and other updates that only the base makes count as W′ − W where there is a base; without
/// one DoRA's magnitudes and products count apart.
///
/// # Errors
/// [`Error::Adapter`] if the written adapter lacks a module, or that a file changed; [`Error::Io`].
pub(super) fn largest(
    source: &Adapter,
    converted: &[Converted],
    written: &HashMap<String, Module>,
    on_base: Option<&OnBaseOf<'_>>,
    task: &Task,
) -> Result<Difference> {
    let mut errors = HashMap::<&str, Sums>::new();
    let mut largest = 0.0f64;
    let mut of_base = Vec::new();
    let mut products = Vec::new();
    for Converted { module, origins } in converted {
        task.check()?;
        // The parameters of experts share their module's path.
        let title = match module.parameters.is_empty() {
            true => module.title(),
            false => module.key.as_str().into(),
        };
        let Some(back) = written.get(&*title) else {
            return Err(Error::adapter(
                source.path(),
                format!("the module {title} was written and not read back"),
            ));
        };
        let bias = difference_of_vectors(module.bias.as_ref(), back.bias.as_ref())?;
        largest = largest.max(bias);
        for origin in origins {
            let own = &source.modules()[&origin.key];
            if own.magnitudes().is_none() && own.delta.has_product() {
                products.push((own, back, origin));
            } else if !(origins.len() == 1 && is_copy(own, back, origin)?) {
                of_base.push((module, own, back, origin));
            }
        }
    }
    let found = products.par_iter().map(|(own, back, origin)| {
        task.check()?;
        let mut sums = Sums::default();
        add(&mut sums, own, back, origin)?;
        Ok((origin.key.as_str(), sums))
    });
    // In order, so that the sums do not depend on the threads.
    for (key, sums) in found.collect::<Result<Vec<_>>>()? {
        let own = errors.entry(key).or_default();
        own.difference += sums.difference;
        own.norm += sums.norm;
    }
    let keys: HashSet<&str> = of_base.iter().map(|(.., origin)| origin.key.as_str()).collect();
    let measured = match on_base {
        _ if keys.is_empty() => Ok(HashMap::new()),
        Some(on_base) => on_base(&keys)?,
        None => Err("give the base (base=, --base) for that of W′ − W".to_owned()),
    };
    let mut apart = None;
    for (module, own, back, origin) in of_base {
        if let Some(error) = measured.as_ref().ok().and_then(|errors| errors.get(&origin.key)) {
            largest = largest.max(*error);
        } else if own.delta.has_product() && back.delta.has_product() {
            let reason = measured.as_ref().err().cloned();
            let none = || format!("the base has no whole weight for {}", own.path);
            apart.get_or_insert_with(|| reason.unwrap_or_else(none));
            let magnitudes = difference_of_vectors(module.magnitudes(), back.magnitudes())?;
            largest = largest.max(magnitudes);
            add(errors.entry(&origin.key).or_default(), own, back, origin)?;
        } else {
            largest = f64::INFINITY;
        }
    }
    let relative = errors.values().map(Sums::relative);
    Ok(Difference { largest: relative.fold(largest, f64::max), apart })
}

/// Whether all tensors of a module were copied, with its scale.
fn is_copy(own: &Module, back: &Module, origin: &Origin) -> Result<bool> {
    if origin.rows.is_some() || origin.own.is_some() || origin.transposed {
        return Ok(false);
    }
    let (one, other) = (own.delta.tensors(), back.delta.tensors());
    let magnitudes = [&own.magnitude, &back.magnitude];
    let has_both = magnitudes[0].is_some() == magnitudes[1].is_some();
    if own.scaling != back.scaling
        || own.delta.form() != back.delta.form()
        || own.delta.is_by_tokens() != back.delta.is_by_tokens()
        || one.len() != other.len()
        || !has_both
    {
        return Ok(false);
    }
    let pairs = one.into_iter().zip(other).map(|((_, one), (_, other))| (one, other));
    for (one, other) in pairs.chain(own.magnitude.iter().zip(&back.magnitude)) {
        if one.dtype != other.dtype || !one.has_same_bytes(other)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Adds what one product, or a part of it, is off.
fn add(sums: &mut Sums, own: &Module, back: &Module, origin: &Origin) -> Result<()> {
    let (mut room, mut other_room) = (Vec::new(), Vec::new());
    for (one, other) in own.products().zip(back.products()) {
        let one = Product { module: own, expert: one };
        let other = Product { module: back, expert: other };
        // One format may have an embedding's product transposed.
        let is_turned = own.delta.is_by_tokens() != back.delta.is_by_tokens();
        let is_transposed = origin.transposed != is_turned;
        let is_whole = origin.rows.is_none() && origin.own.is_none() && !is_transposed;
        if is_whole && one.is_stored_as(other)? {
            continue;
        }
        let (one, other) = (one.read(&mut room)?, other.read(&mut other_room)?);
        if is_whole && one.is_same(&other) {
            continue;
        }
        let one = one.part(false, origin.rows.as_ref())?;
        let other = other.part(is_transposed, origin.own.as_ref())?;
        let (one, other) = (one.update()?, other.update()?);
        sums.difference += difference_norm(&one, &other)?.powi(2);
        sums.norm += frobenius_norm(&one).powi(2);
    }
    Ok(())
}

/// ‖x − y‖/‖x‖ of two vectors; infinite where there is only one of them.
fn difference_of_vectors(one: Option<&Tensor>, other: Option<&Tensor>) -> Result<f64> {
    let (one, other) = match (one, other) {
        (None, None) => return Ok(0.0),
        (Some(one), Some(other)) => (values(one)?, values(other)?),
        _ => return Ok(f64::INFINITY),
    };
    if one.len() != other.len() {
        return Ok(f64::INFINITY);
    }
    let square =
        |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = square(&mut one.iter().zip(&other).map(|(one, other)| one - other));
    let norm = square(&mut one.iter().copied());
    Ok(if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() })
}
