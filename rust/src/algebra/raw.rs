//! PEFT's methods that treat the two factors as if each were the update (`add_weighted_adapter` in
//! peft/tuners/lora/model.py with peft/utils/merge_utils.py, 0.21).
//!
//! With w′ = w·s, A is merged with the weights sign(w′)·√|w′| and B with √|w′|: the product has cross terms,
//! and depends on how the factors share the update. Here for who needs the same numbers.

use super::factored::{Factors, Rows, sides};
use super::merge::Updates;
use crate::entrywise::Cut;
use crate::error::{Error, Result};

/// What is done with each of the two factors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Raw {
    /// Σwx.
    Linear,
    /// The same over the largest elements of each.
    Pruned { density: f64 },
    /// Σwx over the largest elements that have the sign of their sum without weights, over how many these
    /// are.
    Ties { density: f64 },
}

impl Raw {
    /// The factors of the result.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranks that differ.
    pub fn result(self, of: &Updates<'_, '_>) -> Result<Factors> {
        let updates = || {
            of.updates
                .iter()
                .zip(of.weights)
                .filter_map(|(update, weight)| update.as_ref().map(|update| (update, weight)))
        };
        let mut ranks = updates().map(|(update, _)| update.rank());
        let first = ranks.next().unwrap_or(0);
        if let Some(other) = ranks.find(|rank| *rank != first) {
            return Err(Error::Argument(format!(
                "{}: the ranks are {first} and {other}, and PEFT adds factors of one rank; without \
                 compat=\"peft\" updates of any ranks are added",
                of.name
            )));
        }
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for (update, weight) in updates() {
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
            left.push((b, root));
            right.push((a, if weighted < 0.0 { -root } else { root }));
        }
        Ok(Factors { b: self.merged(&left), a: self.merged(&right) })
    }

    fn merged(self, tensors: &[(Rows, f64)]) -> Rows {
        let shape = tensors.first().map_or((0, 0), |(first, _)| (first.rows, first.columns));
        let mut result = Rows::zeros(shape.0, shape.1);
        let largest = |rows: &Rows, density: f64| {
            let narrow: Vec<f32> = rows.values.iter().map(|value| *value as f32).collect();
            let k = (density * narrow.len() as f64) as u64;
            let cut = Cut::of(&narrow, rows.columns, k);
            let mut kept = rows.clone();
            for (index, (value, narrow)) in kept.values.iter_mut().zip(&narrow).enumerate() {
                let place = || ((index / rows.columns) as u64, (index % rows.columns) as u64);
                *value = if cut.takes(*narrow, place) { *value } else { 0.0 };
            }
            kept
        };
        let kept: Vec<(Rows, f64)> = match self {
            Self::Linear => tensors.to_vec(),
            Self::Pruned { density } | Self::Ties { density } => {
                tensors.iter().map(|(rows, weight)| (largest(rows, density), *weight)).collect()
            }
        };
        for (place, target) in result.values.iter_mut().enumerate() {
            let terms = || kept.iter().map(|(rows, weight)| (rows.values[place], *weight));
            if !matches!(self, Self::Ties { .. }) {
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
