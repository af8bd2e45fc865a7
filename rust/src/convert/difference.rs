//! How far the updates of a written adapter are from those that it was made from.

use std::collections::HashMap;

use super::modules::{Converted, Origin};
use crate::adapter::factors::values;
use crate::adapter::{Adapter, Module};
use crate::error::{Error, Result};
use crate::measure::overlap::difference_norm;
use crate::measure::products::Product;
use crate::measure::spectrum::frobenius_norm;
use crate::parallel::task::Task;
use crate::tensor::safetensors::Tensor;

/// The largest of ‖ΔW − ΔW′‖/‖ΔW‖ over the modules of an adapter, in the Frobenius norm. Of updates
/// that only the base makes and that were copied the bytes are held against each other, and of
/// magnitudes their relative difference counts.
///
/// # Errors
/// [`Error::Adapter`] if the written adapter lacks a module, or that a file changed; [`Error::Io`].
pub(super) fn largest(
    source: &Adapter,
    converted: &[Converted],
    written: &HashMap<String, Module>,
    task: &Task,
) -> Result<f64> {
    let mut errors = HashMap::<&str, Sums>::new();
    let mut largest = 0.0f64;
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
        largest = largest.max(difference_of_vectors(&module.magnitude, &back.magnitude)?);
        let bias = difference_of_vectors(&module.bias, &back.bias)?;
        largest = largest.max(bias);
        for origin in origins {
            let own = &source.modules()[&origin.key];
            if own.delta.has_product() {
                let sums = errors.entry(&origin.key).or_default();
                sums.add(own, back, origin)?;
            } else {
                let same = own.delta.tensors().iter().zip(back.delta.tensors()).all(
                    |((_, one), (_, other))| {
                        one.dtype == other.dtype && one.has_same_bytes(other).unwrap_or(false)
                    },
                );
                let is_equal = same && own.scaling == back.scaling;
                largest = largest.max(if is_equal { 0.0 } else { f64::INFINITY });
            }
        }
    }
    let relative = errors.values().map(Sums::relative);
    Ok(relative.fold(largest, f64::max))
}

/// Sums of squares over the parts of one module's product.
#[derive(Default)]
struct Sums {
    difference: f64,
    norm: f64,
}

impl Sums {
    fn relative(&self) -> f64 {
        match (self.difference, self.norm) {
            (0.0, _) => 0.0,
            (difference, norm) => (difference / norm).sqrt(),
        }
    }

    fn add(&mut self, own: &Module, back: &Module, origin: &Origin) -> Result<()> {
        let (mut room, mut other_room) = (Vec::new(), Vec::new());
        for (one, other) in own.products().zip(back.products()) {
            let one = Product { module: own, expert: one }.read(&mut room)?;
            let other = Product { module: back, expert: other }.read(&mut other_room)?;
            // One format may have an embedding's product transposed.
            let is_turned = own.delta.is_by_tokens() != back.delta.is_by_tokens();
            let is_transposed = origin.transposed != is_turned;
            let is_whole = origin.rows.is_none() && origin.own.is_none() && !is_transposed;
            if is_whole && one.is_same(&other) {
                continue;
            }
            let one = one.part(false, origin.rows.as_ref())?;
            let other = other.part(is_transposed, origin.own.as_ref())?;
            let (one, other) = (one.update()?, other.update()?);
            self.difference += difference_norm(&one, &other)?.powi(2);
            self.norm += frobenius_norm(&one).powi(2);
        }
        Ok(())
    }
}

/// ‖x − y‖/‖x‖ of two vectors; infinite where there is only one of them.
fn difference_of_vectors(one: &Option<Tensor>, other: &Option<Tensor>) -> Result<f64> {
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
