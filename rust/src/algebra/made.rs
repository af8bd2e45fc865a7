//! What a method makes of one module's updates, and the factors that are kept of it.

use super::dense::Dense;
use super::factored::{
    Decomposed, Factors, Gauge, Grams, Rows, decomposed, decomposed_with, sides,
};
use super::merge::Updates;
use super::methods::{Family, Method};
use super::ranks::Rule;
use super::rounding;
use super::streamed::scales_left;
use super::work::Cut;
use crate::error::{Error, Result};
use crate::measure::spectrum::{Term, Update, Values, frobenius_norm, values_of};

/// The combined update.
pub(crate) enum Made<'u> {
    /// Σ cᵢΔᵢ with the coefficients, and its Gram matrices where these took them.
    Sum(Update<'u>, Vec<f64>, Option<Grams>),
    /// Two factors.
    Factors(Factors),
    /// By its singular values.
    Decomposed(Decomposed<'static>),
    /// Element by element; with the coefficients, where it is a sum of updates of which some are whole
    /// matrices.
    Dense(Dense, Option<Vec<f64>>),
}

/// What is kept of it.
pub(crate) struct Short {
    /// `None` where that is nothing.
    pub factors: Option<Factors>,
    /// The share of the energy that is kept.
    pub kept: f64,
    /// The norm of what is cut off.
    pub tail: f64,
    /// The norm of the whole.
    pub norm: f64,
    /// Its singular values, where they were asked for.
    pub values: Vec<f64>,
}

impl Short {
    /// Of what is written in another way.
    pub fn nothing() -> Self {
        Self { factors: None, kept: 1.0, tail: 0.0, norm: 0.0, values: Vec::new() }
    }
}

impl<'u> Made<'u> {
    /// What a method makes of updates; `None` if they are not finite.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] where the method is not defined for them.
    pub fn of(method: &Method, of: &Updates<'_, 'u>) -> Result<Option<Self>> {
        let [rows, columns] = of.shape;
        match &method.family {
            Family::Sum(gram) => {
                let (mut coefficients, grams) = gram.of(of)?;
                coefficients.iter_mut().for_each(|value| *value *= method.lambda);
                if of.has_dense() {
                    let total = Dense::sum(&coefficients, of);
                    return Ok(total.map(|total| Self::Dense(total, Some(coefficients))));
                }
                let mut total = Update::sum(rows, columns, Vec::new())?;
                for (update, coefficient) in of.updates.iter().zip(&coefficients) {
                    if let Some(update) = update.as_ref().filter(|_| *coefficient != 0.0) {
                        total = total.plus(&update.scaled(*coefficient))?;
                    }
                }
                // What is left out of the sum is in the matrices.
                let ranks = of.updates.iter().flatten().map(Update::rank);
                let grams = grams.filter(|_| ranks.sum::<usize>() == total.rank());
                Ok(Some(Self::Sum(total, coefficients, grams)))
            }
            Family::Joint(_) | Family::Raw(_) if of.has_dense() => Err(Error::Argument(format!(
                "{} is changed as a whole by an adapter (DoRA or the like), and this method takes \
                     products of two factors: make that adapter plain with its base first (lorafast.bake \
                     with plain and base, lorafast bake --plain --base)",
                of.name
            ))),
            Family::Joint(joint) => {
                let found = joint.result(of, method.counts)?;
                Ok(found.map(|found| Self::Decomposed(found.scaled(method.lambda))))
            }
            Family::Entries(entries) => {
                let found = Dense::of(*entries, method.lambda, of);
                Ok(found.map(|found| Self::Dense(found, None)))
            }
            Family::Raw(raw) => {
                let mut factors = raw.result(of)?;
                factors.b.values.iter_mut().for_each(|value| *value *= method.lambda);
                Ok(Some(Self::Factors(factors)))
            }
        }
    }

    /// What each update was multiplied by, where it is a sum of them.
    pub fn coefficients(&self) -> Option<&[f64]> {
        match self {
            Self::Sum(_, coefficients, _) | Self::Dense(_, Some(coefficients)) => {
                Some(coefficients)
            }
            _ => None,
        }
    }

    /// All singular values; `None` if they cannot be found.
    pub fn values(&self) -> Option<Vec<f64>> {
        match self {
            Self::Sum(total, ..) => Some(values_of(total)),
            Self::Factors(factors) => Some(values_of(&product(factors))),
            Self::Decomposed(found) => Some(found.values.clone()),
            Self::Dense(dense, _) => Some(dense.all()?.found.values),
        }
    }

    /// The factors that a rule keeps, over a scale that they are written with; `rank` is what a budget
    /// gives the module. `None` if they are not finite.
    pub fn short(&self, cut: Option<Cut>, rank: Option<usize>, scale_out: f64) -> Option<Short> {
        let short = match (self, cut) {
            (Self::Sum(total, ..), None) => uncut(total, scale_out),
            (Self::Sum(total, _, grams), Some(cut)) => {
                let found = decomposed_with(total, grams.as_ref())?;
                let floor = match cut.rule {
                    Rule::Auto => rounding::floor(total),
                    _ => 0.0,
                };
                let wanted = |rule: Rule| rule.choose(&found.values, floor, cut.is_kohya);
                let k = rank.unwrap_or_else(|| wanted(cut.rule));
                let full = cut.full(k);
                if full >= total.rank() && total.terms().len() == 1 {
                    // Nothing is cut: the stored factors as they stand.
                    let short = measured(&found, None, k.min(full));
                    let factors = (short.norm != 0.0 && k > 0)
                        .then(|| padded(side_by_side(&without_scale(total, scale_out)), full));
                    Short { factors, ..short }
                } else {
                    shortened(&found, None, k, full, scale_out)
                }
            }
            (Self::Factors(factors), None) => {
                let norm = frobenius_norm(&product(factors));
                let factors = (norm != 0.0).then(|| factors.clone());
                Short { factors, kept: 1.0, tail: 0.0, norm, values: Vec::new() }
            }
            (Self::Factors(factors), Some(cut)) => {
                let found = decomposed(&product(factors))?;
                let k = rank.unwrap_or_else(|| cut.rule.choose(&found.values, 0.0, cut.is_kohya));
                shortened(&found, None, k, cut.full(k), scale_out)
            }
            (Self::Decomposed(found), cut) => {
                let all = found.values.iter().filter(|value| **value > 0.0).count();
                let (k, full) = match cut {
                    None => (all, all),
                    Some(cut) => {
                        let own = || cut.rule.choose(&found.values, 0.0, cut.is_kohya);
                        let k = rank.unwrap_or_else(own);
                        (k, cut.full(k))
                    }
                };
                shortened(found, None, k, full, scale_out)
            }
            (Self::Dense(dense, _), cut) => {
                let cut = cut.expect("a method of full rank has a rule");
                let rule = rank.map_or(cut.rule, |rank| Rule::Fixed(rank as u64));
                let (leading, k) = dense.chosen(rule, cut.is_kohya)?;
                let norm = dense.norm();
                let short = shortened(&leading.found, Some(norm), k, cut.full(k), scale_out);
                let values = leading.found.values[..leading.trusted].to_vec();
                Short { values, ..short }
            }
        };
        short.norm.is_finite().then_some(short)
    }
}

impl Cut {
    /// The rank that is written where k triplets are kept.
    pub(super) fn full(&self, k: usize) -> usize {
        let most = self.max_rank.map_or(usize::MAX, |max| max as usize);
        match self.rule {
            Rule::Fixed(rank) => (rank as usize).min(most),
            _ => k.min(most),
        }
    }
}

fn product(factors: &Factors) -> Update<'_> {
    let (rows, columns, rank) = (factors.b.rows, factors.a.columns, factors.b.columns);
    let (left, right) = (Values::F64(&factors.b.values), Values::F64(&factors.a.values));
    Update::new(rows, columns, rank, left, right, 1.0).expect("factors of one product")
}

/// All of a sum.
fn uncut(total: &Update<'_>, scale_out: f64) -> Short {
    // Of no adapter with a weight, nothing is added.
    let factors = (total.rank() > 0).then(|| side_by_side(&without_scale(total, scale_out)));
    let norm = match factors.as_ref().map_or(Some(0.0), Factors::norm) {
        Some(norm) => norm * scale_out.abs(),
        None => frobenius_norm(total),
    };
    let factors = factors.filter(|_| norm != 0.0);
    Short { factors, kept: 1.0, tail: 0.0, norm, values: Vec::new() }
}

/// What the first k triplets are of the whole, whose norm is given where they are not of all there are.
fn measured(found: &Decomposed<'_>, norm: Option<f64>, k: usize) -> Short {
    let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    let kept = square(&found.values[..k]);
    let (all, tail) = match norm {
        None => (square(&found.values), square(&found.values[k..])),
        Some(norm) => (norm * norm, (norm * norm - kept).max(0.0)),
    };
    Short {
        factors: None,
        kept: if all == 0.0 { 1.0 } else { kept / all },
        tail: tail.sqrt(),
        norm: all.sqrt(),
        values: found.values.clone(),
    }
}

/// The same with their factors, and zeros up to the rank `full`.
pub(super) fn shortened(
    found: &Decomposed<'_>,
    norm: Option<f64>,
    k: usize,
    full: usize,
    scale_out: f64,
) -> Short {
    let k = k.min(full);
    let short = measured(found, norm, k);
    let factors = (short.norm != 0.0 && k > 0).then(|| {
        let weight = 1.0 / scale_out.abs().sqrt();
        let scales: Vec<f64> =
            found.values[..k].iter().map(|value| value.sqrt() * weight).collect();
        let left: Vec<f64> = scales.iter().map(|value| value * scale_out.signum()).collect();
        let factors = match scale_out {
            1.0 => found.truncated(k, Gauge::Balanced),
            _ => found.with_scales(&left, &scales),
        };
        padded(factors, full)
    });
    Short { factors, ..short }
}

/// The factors of a sum next to one another, each product's scale on its smaller side; a power of two is
/// exact on either.
pub(super) fn side_by_side(total: &Update<'_>) -> Factors {
    let (mut b, mut a) = sides(total);
    let scales = total.scales();
    if scales_left(total) {
        for row in b.values.chunks_exact_mut(scales.len()) {
            row.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
        }
    } else {
        for (row, scale) in a.values.chunks_exact_mut(total.columns()).zip(&scales) {
            row.iter_mut().for_each(|value| *value *= scale);
        }
    }
    Factors { b, a }
}

/// An update over a number, with the quotients of scales that are that number exactly one.
pub(super) fn without_scale<'u>(update: &Update<'u>, scale: f64) -> Update<'u> {
    let divided = |term: &Term<'u>| Term { scale: term.scale / scale, ..*term };
    let terms = update.terms().iter().map(divided).collect();
    Update::sum(update.rows(), update.columns(), terms).expect("the shapes are those of before")
}

/// The same with zeros up to that rank.
pub(super) fn padded(factors: Factors, rank: usize) -> Factors {
    let Factors { b, mut a } = factors;
    if b.columns >= rank {
        return Factors { b, a };
    }
    let mut wide = Rows::zeros(b.rows, rank);
    for (target, source) in
        wide.values.chunks_exact_mut(rank).zip(b.values.chunks_exact(b.columns.max(1)))
    {
        target[..b.columns].copy_from_slice(source);
    }
    a.values.resize(rank * a.columns, 0.0);
    a.rows = rank;
    Factors { b: wide, a }
}
