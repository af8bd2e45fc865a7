//! PEFT's methods that treat the two factors as if each were the update (`add_weighted_adapter` in
//! peft/tuners/lora/model.py with peft/utils/merge_utils.py, 0.21).
//!
//! With w′ = w·s, A is merged with the weights sign(w′)·√|w′| and B with √|w′|: the product has cross terms,
//! and depends on how the factors share the update. Here for who needs the same numbers.

use super::factored::{Factors, Rows, sides};
use super::merge::Updates;
use crate::entrywise::{Cut, Mask};
use crate::error::{Error, Result};

/// What is done with each of the two factors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Raw {
    trim: Trim,
    /// Whether only elements are summed that have the sign of their sum without weights, over how many
    /// these are.
    elects: bool,
}

/// Which elements of a factor are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trim {
    All,
    /// The ⌊density·numel⌋ largest.
    Largest {
        density: f64,
    },
    /// Each with the probability density, divided by it.
    Random {
        density: f64,
    },
}

/// A factor with its weight, and the adapter that it is of.
struct Weighted {
    adapter: usize,
    rows: Rows,
    weight: f64,
}

impl Raw {
    /// Σwx.
    pub const LINEAR: Self = Self { trim: Trim::All, elects: false };

    /// The method of one of PEFT's names.
    pub fn of(name: &str, density: f64) -> Self {
        let trim = match name {
            "dare_linear" | "dare_ties" => Trim::Random { density },
            _ => Trim::Largest { density },
        };
        Self { trim, elects: name.ends_with("ties") }
    }

    /// Whether it depends on a seed.
    pub fn is_random(self) -> bool {
        matches!(self.trim, Trim::Random { .. })
    }

    /// The factors of the result.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranks that differ.
    pub fn result(self, of: &Updates<'_, '_>) -> Result<Factors> {
        let updates =
            || {
                of.updates.iter().zip(of.weights).enumerate().filter_map(
                    |(adapter, (update, weight))| Some((adapter, update.as_ref()?, weight)),
                )
            };
        let mut ranks = updates().map(|(_, update, _)| update.rank());
        let first = ranks.next().unwrap_or(0);
        if let Some(other) = ranks.find(|rank| *rank != first) {
            return Err(Error::Argument(format!(
                "{}: the ranks are {first} and {other}, and PEFT adds factors of one rank; without \
                 compat=\"peft\" updates of any ranks are added",
                of.name
            )));
        }
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for (adapter, update, weight) in updates() {
            let [term] = update.terms() else {
                return Err(Error::Argument(format!(
                    "{}: an update of several products has no factors as PEFT knows them; without \
                     compat=\"peft\" it is added as it is",
                    of.name
                )));
            };
            let (b, a) = sides(update);
            let weighted = weight * term.scale;
            let root = weighted.abs().sqrt();
            left.push(Weighted { adapter, rows: b, weight: root });
            let weight = if weighted < 0.0 { -root } else { root };
            right.push(Weighted { adapter, rows: a, weight });
        }
        let named = |factor: &str| format!("{}.{factor}", of.name);
        Ok(Factors {
            b: self.merged(left, of.seed, &named("B")),
            a: self.merged(right, of.seed, &named("A")),
        })
    }

    /// One factor of those of all adapters; `name` is what random masks depend on.
    fn merged(self, mut tensors: Vec<Weighted>, seed: u64, name: &str) -> Rows {
        let shape = tensors.first().map_or((0, 0), |first| (first.rows.rows, first.rows.columns));
        let mut result = Rows::zeros(shape.0, shape.1);
        for tensor in &mut tensors {
            self.trim.apply(&mut tensor.rows, Mask::new(seed, name, tensor.adapter));
        }
        for (place, target) in result.values.iter_mut().enumerate() {
            let terms = || tensors.iter().map(|tensor| (tensor.rows.values[place], tensor.weight));
            if !self.elects {
                *target = terms().map(|(value, weight)| weight * value).sum();
                continue;
            }
            let is_positive = terms().map(|(value, _)| value).sum::<f64>() >= 0.0;
            let agreeing =
                || terms().filter(|(value, _)| *value != 0.0 && (*value > 0.0) == is_positive);
            let sum: f64 = agreeing().map(|(value, weight)| weight * value).sum();
            *target = sum / agreeing().count().max(1) as f64;
        }
        result
    }
}

impl Trim {
    fn apply(self, rows: &mut Rows, mask: Mask) {
        match self {
            Self::All => {}
            Self::Largest { density } => {
                let narrow: Vec<f32> = rows.values.iter().map(|value| *value as f32).collect();
                let k = (density * narrow.len() as f64) as u64;
                let (cut, columns) = (Cut::of(&narrow, rows.columns, k), rows.columns);
                for (index, (value, narrow)) in rows.values.iter_mut().zip(&narrow).enumerate() {
                    let place = || ((index / columns) as u64, (index % columns) as u64);
                    *value = if cut.takes(*narrow, place) { *value } else { 0.0 };
                }
            }
            Self::Random { density } => {
                for (index, value) in rows.values.iter_mut().enumerate() {
                    let is_kept = mask.uniform(index as u64) < density;
                    *value = if is_kept { *value / density } else { 0.0 };
                }
            }
        }
    }
}
