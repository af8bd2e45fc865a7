//! The coefficients c of ΣcᵢΔᵢ for methods that need no more of the updates than their inner products.
//!
//! Everything is of one tensor. Sources: task arithmetic, arXiv:2212.04089; model stock, arXiv:2403.19522;
//! slerp, Shoemake 1985; the Riemannian mean (karcher) and multislerp as mergekit has them.

use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// The methods by their names, with the options that each takes beside a factor on the result.
pub(crate) const METHODS: [(&str, &[&str]); 9] = [
    ("linear", &[]),
    ("normalized", &[]),
    ("centroid", &[]),
    ("slerp", &["t"]),
    ("nuslerp", &[]),
    ("karcher", &["max_iter", "tol"]),
    ("multislerp", &["eps"]),
    ("model_stock", &[]),
    ("projection", &[]),
];

/// The numbers that methods take.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Numbers {
    pub t: Option<f64>,
    pub max_iter: Option<u64>,
    pub tol: Option<f64>,
    pub eps: Option<f64>,
}

/// A method, with what it was given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Gram {
    /// wᵢ.
    Linear,
    /// wᵢ/Σw.
    Normalized,
    /// 1/N over all adapters.
    Centroid,
    /// From the first at t = 0 to the second at t = 1 on the sphere, each with its length.
    Slerp { t: f64 },
    /// The same with t = w₂/(w₁ + w₂).
    Nuslerp,
    /// The Riemannian mean of the directions, of the mean length.
    Karcher { steps: u64, tolerance: f64 },
    /// The normalized mean of the directions, of the weighted mean length. mergekit's step from there, along
    /// the mean of what each direction has beside it, is of no length, as that mean is zero.
    Multislerp { epsilon: f64 },
    /// The mean, shortened by how much the updates agree.
    ModelStock,
    /// The first without what it has in common with the others.
    Projection,
}

/// Above this cosine, slerp is linear, as mergekit's.
const ALIGNED: f64 = 0.9995;
/// Below this sine, nuslerp is.
const SINE: f64 = 1e-8;

impl Gram {
    /// The method of that name for so many adapters.
    ///
    /// # Errors
    /// [`Error::Argument`] for numbers outside of their domain, weights where the method takes none, and
    /// another number of adapters than it is for.
    ///
    /// # Panics
    /// For a name that is not among [`METHODS`].
    pub fn new(name: &str, numbers: &Numbers, count: usize, has_weights: bool) -> Result<Self> {
        let number = |name: &str, value: Option<f64>, default: f64, is_valid: fn(f64) -> bool| {
            let value = value.unwrap_or(default);
            match is_valid(value) {
                true => Ok(value),
                false => Err(Error::Argument(format!("the option {name} is {value}"))),
            }
        };
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let (least, most) = match name {
            "linear" | "normalized" | "centroid" | "karcher" => (1, usize::MAX),
            "slerp" | "nuslerp" => (2, 2),
            _ => (2, usize::MAX),
        };
        if !(least..=most).contains(&count) {
            return Err(Error::Argument(format!(
                "{name} is for {} adapters, and there {} {count}",
                if least == most { least.to_string() } else { format!("at least {least}") },
                if count == 1 { "is" } else { "are" }
            )));
        }
        let method = match name {
            "linear" => Self::Linear,
            "normalized" => Self::Normalized,
            "centroid" => Self::Centroid,
            "slerp" => {
                Self::Slerp { t: number("t", numbers.t, 0.5, |t| (0.0..=1.0).contains(&t))? }
            }
            "nuslerp" => Self::Nuslerp,
            "karcher" => Self::Karcher {
                steps: numbers.max_iter.unwrap_or(1000),
                tolerance: number("tol", numbers.tol, 1e-12, positive)?,
            },
            "multislerp" => {
                Self::Multislerp { epsilon: number("eps", numbers.eps, 1e-8, positive)? }
            }
            "model_stock" => Self::ModelStock,
            "projection" => Self::Projection,
            _ => unreachable!("the name of a method"),
        };
        match has_weights && !method.takes_weights() {
            true => Err(Error::Argument(format!("{name} takes no weights"))),
            false => Ok(method),
        }
    }

    /// Checks the weights of one module, where they are divided by their sum.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check_weights(&self, weights: &[f64], module: &str) -> Result<()> {
        let sum: f64 = weights.iter().sum();
        let is_defined = weights.iter().all(|weight| *weight >= 0.0) && sum > 0.0;
        match is_defined || !self.divides_by_weights() {
            true => Ok(()),
            false => Err(Error::Argument(format!(
                "the weights {weights:?} are divided by their sum, for which none may be negative and one \
                 has to be above zero ({module}); the method linear takes any"
            ))),
        }
    }

    /// Whether adapters can have weights.
    pub fn takes_weights(&self) -> bool {
        !matches!(self, Self::Centroid | Self::Slerp { .. } | Self::ModelStock | Self::Projection)
    }

    /// Whether coefficients need no inner products.
    pub fn needs_no_products(&self) -> bool {
        matches!(self, Self::Linear | Self::Normalized | Self::Centroid)
    }

    /// The coefficients; the inner products are asked for where they are needed.
    pub fn coefficients_with(
        &self,
        products: impl FnOnce() -> Matrix,
        weights: &[f64],
    ) -> Vec<f64> {
        match self {
            Self::Linear | Self::Normalized | Self::Centroid => {
                self.coefficients(&Matrix::zeros(0, 0), weights)
            }
            _ => self.coefficients(&products(), weights),
        }
    }

    /// Whether weights are divided by their sum.
    fn divides_by_weights(&self) -> bool {
        matches!(
            self,
            Self::Normalized | Self::Nuslerp | Self::Karcher { .. } | Self::Multislerp { .. }
        )
    }

    /// The coefficients of N updates with these inner products and weights. The first three methods need
    /// no products.
    pub fn coefficients(&self, products: &Matrix, weights: &[f64]) -> Vec<f64> {
        let count = weights.len();
        let norms: Vec<f64> =
            (0..products.rows).map(|i| products.get(i, i).max(0.0).sqrt()).collect();
        match self {
            Self::Linear => weights.to_vec(),
            Self::Normalized => {
                let sum: f64 = weights.iter().sum();
                weights.iter().map(|weight| weight / sum).collect()
            }
            Self::Centroid => vec![1.0 / count as f64; count],
            Self::Slerp { t } => slerp(products, &norms, *t, |cosine, _| cosine.abs() > ALIGNED),
            Self::Nuslerp => {
                let t = weights[1] / (weights[0] + weights[1]);
                slerp(products, &norms, t, |_, sine| sine.abs() < SINE)
            }
            Self::Karcher { steps, tolerance } => {
                let sum: f64 = weights.iter().sum();
                let shares: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
                let length = norms.iter().sum::<f64>() / count as f64;
                karcher(products, &norms, &shares, *steps, *tolerance)
                    .iter()
                    .map(|value| value * length)
                    .collect()
            }
            Self::Multislerp { epsilon } => {
                let sum: f64 = weights.iter().sum();
                let shares: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
                let length: f64 = shares.iter().zip(&norms).map(|(share, norm)| share * norm).sum();
                match mean_direction(products, &norms, &shares, *epsilon) {
                    Some(mean) => mean.coefficients.iter().map(|value| value * length).collect(),
                    None => vec![0.0; count],
                }
            }
            Self::ModelStock => {
                let mut sum = 0.0;
                for i in 0..count {
                    for j in 0..i {
                        sum += cosine(products, &norms, i, j);
                    }
                }
                let pairs = count * (count - 1) / 2;
                let mean = sum / pairs as f64;
                let n = count as f64;
                let t = n * mean / (1.0 + (n - 1.0) * mean);
                vec![t / n; count]
            }
            Self::Projection => projection(products),
        }
    }
}

/// The cosine of two; 0 where one is zero.
fn cosine(products: &Matrix, norms: &[f64], i: usize, j: usize) -> f64 {
    let length = norms[i] * norms[j];
    if length == 0.0 { 0.0 } else { (products.get(i, j) / length).clamp(-1.0, 1.0) }
}

fn slerp(
    products: &Matrix,
    norms: &[f64],
    t: f64,
    is_linear: impl Fn(f64, f64) -> bool,
) -> Vec<f64> {
    let linear = vec![1.0 - t, t];
    if norms.contains(&0.0) {
        return linear;
    }
    let cosine = cosine(products, norms, 0, 1);
    let angle = cosine.acos();
    let sine = angle.sin();
    if is_linear(cosine, sine) {
        return linear;
    }
    vec![((1.0 - t) * angle).sin() / sine, (t * angle).sin() / sine]
}

/// A vector in the span of the updates, by its coefficients.
struct Point<'a> {
    products: &'a Matrix,
    coefficients: Vec<f64>,
}

impl Point<'_> {
    /// ⟨self, Δᵢ⟩.
    fn with(&self, index: usize) -> f64 {
        let terms = self.coefficients.iter().enumerate();
        terms.map(|(j, value)| value * self.products.get(index, j)).sum()
    }

    fn norm(&self) -> f64 {
        let terms = self.coefficients.iter().enumerate();
        terms.map(|(i, value)| value * self.with(i)).sum::<f64>().max(0.0).sqrt()
    }

    fn scale(&mut self, factor: f64) {
        self.coefficients.iter_mut().for_each(|value| *value *= factor);
    }
}

/// Σ wᵢ log_u(δᵢ): the mean of the directions as seen from u, of unit length.
fn tangent<'a>(at: &Point<'a>, norms: &[f64], shares: &[f64]) -> Point<'a> {
    let mut mean = Point { products: at.products, coefficients: vec![0.0; norms.len()] };
    for (index, (norm, share)) in norms.iter().zip(shares).enumerate() {
        if *norm == 0.0 {
            continue;
        }
        let cosine = (at.with(index) / norm).clamp(-1.0, 1.0);
        let angle = cosine.acos();
        let sine = angle.sin();
        if sine < 1e-12 {
            continue;
        }
        let factor = share * angle / sine;
        mean.coefficients[index] += factor / norm;
        for (target, value) in mean.coefficients.iter_mut().zip(&at.coefficients) {
            *target -= factor * cosine * value;
        }
    }
    mean
}

/// Where the step along a tangent ends, on the unit sphere.
fn step(at: &mut Point<'_>, along: &Point<'_>, length: f64) {
    let (cosine, sine) = (length.cos(), length.sin() / length);
    for (target, value) in at.coefficients.iter_mut().zip(&along.coefficients) {
        *target = cosine * *target + sine * value;
    }
}

/// Σ wᵢδᵢ of unit length; `None` where the directions cancel.
fn mean_direction<'a>(
    products: &'a Matrix,
    norms: &[f64],
    shares: &[f64],
    epsilon: f64,
) -> Option<Point<'a>> {
    let of = |(share, norm): (&f64, &f64)| if *norm == 0.0 { 0.0 } else { share / norm };
    let coefficients = shares.iter().zip(norms).map(of).collect();
    let mut mean = Point { products, coefficients };
    let length = mean.norm();
    if length < epsilon {
        return None;
    }
    mean.scale(1.0 / length);
    Some(mean)
}

/// The Riemannian mean of the directions. Where they cancel, there is none, and it is zero.
fn karcher(
    products: &Matrix,
    norms: &[f64],
    shares: &[f64],
    steps: u64,
    tolerance: f64,
) -> Vec<f64> {
    let Some(mut mean) = mean_direction(products, norms, shares, 1e-12) else {
        return vec![0.0; norms.len()];
    };
    for _ in 0..steps {
        let along = tangent(&mean, norms, shares);
        let length = along.norm();
        if length < tolerance {
            break;
        }
        step(&mut mean, &along, length);
        // Rounding would let it grow.
        let norm = mean.norm();
        mean.scale(1.0 / norm);
    }
    mean.coefficients
}

/// The first less its projection on the span of the others: Δ₁ − Σ xⱼΔⱼ with G x = g over the others.
/// Those that depend on others before them add nothing.
fn projection(products: &Matrix) -> Vec<f64> {
    /// What is left of a direction relative to itself where it depends on those before it.
    const DEPENDENT: f64 = 1e-12;
    let count = products.rows;
    // Gram-Schmidt on coefficients: orthogonal directions of the span of the others.
    let mut basis: Vec<(Point<'_>, f64)> = Vec::new();
    let without = |point: &mut Point<'_>, basis: &[(Point<'_>, f64)]| {
        for (other, square) in basis {
            let terms = other.coefficients.iter().enumerate();
            let inner: f64 = terms.map(|(j, value)| value * point.with(j)).sum();
            for (target, value) in point.coefficients.iter_mut().zip(&other.coefficients) {
                *target -= inner / square * value;
            }
        }
    };
    let unit = |index: usize| {
        let mut coefficients = vec![0.0; count];
        coefficients[index] = 1.0;
        Point { products, coefficients }
    };
    for index in 1..count {
        let mut own = unit(index);
        without(&mut own, &basis);
        let square = own.norm().powi(2);
        if square > DEPENDENT * products.get(index, index) && square > 0.0 {
            basis.push((own, square));
        }
    }
    let mut first = unit(0);
    without(&mut first, &basis);
    first.coefficients
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inner products of the toys X, Y and Z.
    const TOYS: [[f64; 3]; 3] = [[184.0, 38.0, -12.0], [38.0, 33.0, 9.0], [-12.0, 9.0, 162.0]];
    const KARCHER: Gram = Gram::Karcher { steps: 1000, tolerance: 1e-13 };

    fn matrix<const N: usize>(rows: [[f64; N]; N]) -> Matrix {
        Matrix { rows: N, columns: N, data: rows.concat() }
    }

    fn check<const N: usize>(
        method: &Gram,
        rows: [[f64; N]; N],
        weights: [f64; N],
        wanted: [f64; N],
    ) {
        let found = method.coefficients(&matrix(rows), &weights);
        for (value, wanted) in found.iter().zip(wanted) {
            assert!((value - wanted).abs() < 2e-8, "{method:?}: {found:?}");
        }
    }

    #[test]
    fn coefficients_are_those_of_the_reference() {
        let pq = [[2100.0, 502.0], [502.0, 1958.0]];
        check(&Gram::Slerp { t: 0.25 }, pq, [1.0; 2], [0.8631542461, 0.3346081106]);
        check(&Gram::Nuslerp, pq, [3.0, 1.0], [0.8631542461, 0.3346081106]);
        check(&KARCHER, pq, [1.0; 2], [0.6221834205, 0.6443498589]);
        check(&Gram::ModelStock, pq, [1.0; 2], [0.1984380018; 2]);
        check(&KARCHER, TOYS, [1.0; 3], [0.38874231, 0.88634212, 0.43897084]);
        check(
            &Gram::Multislerp { epsilon: 1e-8 },
            TOYS,
            [1.0; 3],
            [0.38963757, 0.92005283, 0.41525247],
        );
        check(&Gram::ModelStock, TOYS, [1.0; 3], [0.3977327943 / 3.0; 3]);
        check(&Gram::Projection, pq, [1.0; 2], [1.0, -502.0 / 1958.0]);
        check(&Gram::Linear, pq, [1.0, -0.5], [1.0, -0.5]);
        check(&Gram::Normalized, pq, [3.0, 1.0], [0.75, 0.25]);
        check(&Gram::Centroid, TOYS, [1.0; 3], [1.0 / 3.0; 3]);
    }

    #[test]
    fn what_is_zero_or_the_same_leaves_no_angle() {
        let half = [0.5; 2];
        let zero = [[4.0, 0.0], [0.0, 0.0]];
        check(&Gram::Slerp { t: 0.5 }, zero, [1.0; 2], half);
        check(&Gram::Nuslerp, [[4.0, 4.0], [4.0, 4.0]], [1.0; 2], half);
        check(&Gram::Projection, [[4.0, 4.0], [4.0, 4.0]], [1.0; 2], [1.0, -1.0]);
        check(&Gram::Projection, zero, [1.0; 2], [1.0, 0.0]);
        check(&KARCHER, [[4.0, -4.0], [-4.0, 4.0]], [1.0; 2], [0.0; 2]);
    }

    #[test]
    fn a_projection_leaves_nothing_of_any_of_the_others() {
        let found = Gram::Projection.coefficients(&matrix(TOYS), &[1.0; 3]);
        for row in &TOYS[1..] {
            let inner: f64 = row.iter().zip(&found).map(|(product, value)| product * value).sum();
            assert!(inner.abs() < 1e-12, "{found:?}");
        }
    }
}
