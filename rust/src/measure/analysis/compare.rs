//! What several adapters have in common, module by module.

use indexmap::IndexMap;
use rayon::prelude::*;
use serde::Serialize;

use super::{Factors, factor_bytes, unmeasured};
use crate::adapter::{Adapter, Module};
use crate::error::Result;
use crate::measure::overlap::{
    SIGN_SAMPLES, SingularBases, SubspaceSimilarity, cosine_of, difference_norm, inner_product,
    sign_agreement,
};
use crate::measure::spectrum::{Update, frobenius_norm};
use crate::parallel::task::Task;

/// Two adapters' updates of one module. Output is the left side, input the right.
#[derive(Debug, Clone, Serialize)]
pub struct PairComparison {
    /// Position of the first adapter.
    pub first: usize,
    /// Position of the second, greater than the first's.
    pub second: usize,
    /// ⟨X, Y⟩.
    pub inner_product: f64,
    /// ⟨X, Y⟩/(‖X‖·‖Y‖); NaN where one is zero or not finite.
    pub cosine: f64,
    /// ‖X − Y‖_F / max(‖X‖_F, ‖Y‖_F).
    pub relative_difference: f64,
    /// The share of entries that both change in the same direction.
    pub sign_agreement: f64,
    /// Whether they were sampled.
    pub sign_sampled: bool,
    /// The numbers i and j of leading directions that φ(i, j) is given for.
    pub sizes: [Vec<usize>; 2],
    /// φ(i, j) of the output subspaces and its expectation for random ones.
    pub output_phi: Vec<Vec<f64>>,
    /// That expectation.
    pub output_expected: Vec<Vec<f64>>,
    /// φ(i, j) of the input subspaces.
    pub input_phi: Vec<Vec<f64>>,
    /// Its expectation for random ones.
    pub input_expected: Vec<Vec<f64>>,
    /// Principal angles between the whole output subspaces, ascending, in radians.
    pub output_angles: Vec<f64>,
    /// Principal angles between the whole input subspaces.
    pub input_angles: Vec<f64>,
}

/// One module in each of the adapters.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleComparison {
    /// Its path.
    pub path: String,
    /// (out, in) of ΔW in the first adapter that has it.
    pub shape: [usize; 2],
    /// ‖ΔW‖_F in each adapter; `None` where it is absent.
    pub norms: Vec<Option<f64>>,
    /// r in each adapter.
    pub ranks: Vec<Option<u64>>,
    /// The pairs of adapters that both have it in one shape, in order.
    pub pairs: Vec<PairComparison>,
}

/// What several adapters have in common.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Cosines of the whole updates, a row for each adapter. What only one has is zero in the
    /// other. NaN where a module has different shapes, or an adapter is zero or not finite.
    pub cosine: Vec<Vec<f64>>,
    /// Every module of any adapter, in the order in which they are first met.
    pub modules: Vec<ModuleComparison>,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

/// Compares any number of adapters, on the given threads. Progress is counted in bytes.
///
/// # Errors
/// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`],
/// [`crate::Error::Cancelled`].
pub fn compare(adapters: &[&Adapter], pool: &rayon::ThreadPool, task: &Task) -> Result<Comparison> {
    let mut paths = IndexMap::<&str, Vec<Option<&Module>>>::new();
    for (position, adapter) in adapters.iter().enumerate() {
        for (path, module) in adapter.modules() {
            paths.entry(path).or_insert_with(|| vec![None; adapters.len()])[position] =
                Some(module);
        }
    }
    task.expect(paths.values().map(|members| bytes_of(members)).sum());
    let paths: Vec<_> = paths.into_iter().collect();
    let compared: Vec<Compared> = pool.install(|| {
        paths
            .par_iter()
            .map(|(path, members)| {
                let compared = compare_module(path, adapters, members, task)?;
                task.advance(bytes_of(members));
                Ok(compared)
            })
            .collect::<Result<_>>()
    })?;
    adapters.iter().try_for_each(|adapter| adapter.check_unchanged())?;
    let count = adapters.len();
    let mut products = vec![vec![0.0; count]; count];
    let mut modules = Vec::with_capacity(compared.len());
    let mut notes = Vec::new();
    for Compared { module, notes: own, clashes } in compared {
        for (position, norm) in module.norms.iter().enumerate() {
            products[position][position] += norm.map_or(0.0, |norm| norm * norm);
        }
        for pair in &module.pairs {
            products[pair.first][pair.second] += pair.inner_product;
        }
        for (first, second) in clashes {
            products[first][second] = f64::NAN;
        }
        notes.extend(own);
        modules.push(module);
    }
    let norms: Vec<f64> = (0..count).map(|index| products[index][index].sqrt()).collect();
    let cosine = (0..count).map(|row| {
        (0..count)
            .map(|column| match row == column {
                true => itself(norms[row]),
                false => {
                    let product = products[row.min(column)][row.max(column)];
                    cosine_of(product, [norms[row], norms[column]])
                }
            })
            .collect()
    });
    Ok(Comparison { cosine: cosine.collect(), modules, notes })
}

/// The cosine of an update with itself.
fn itself(norm: f64) -> f64 {
    if norm.is_finite() && norm > 0.0 { 1.0 } else { f64::NAN }
}

fn bytes_of(members: &[Option<&Module>]) -> u64 {
    members.iter().flatten().map(|module| factor_bytes(module)).sum()
}

struct Compared {
    module: ModuleComparison,
    notes: Vec<String>,
    clashes: Vec<(usize, usize)>,
}

/// An adapter's part in the comparison of one module.
struct Member<'a> {
    position: usize,
    update: Update<'a>,
    norm: f64,
    bases: Option<SingularBases>,
}

fn compare_module(
    path: &str,
    adapters: &[&Adapter],
    modules: &[Option<&Module>],
    task: &Task,
) -> Result<Compared> {
    let mut notes = Vec::new();
    let mut factors = Vec::new();
    let mut rooms = vec![Vec::new(); adapters.len()];
    let pairs = adapters.iter().zip(modules).zip(&mut rooms).enumerate();
    for (position, ((adapter, module), room)) in pairs {
        let Some(module) = module else { continue };
        task.check()?;
        match Factors::read(module, room)? {
            Some(read) => factors.push((position, read)),
            None => notes.push(format!("{}: {}", adapter.path().display(), unmeasured(module))),
        }
    }
    let mut members = Vec::new();
    let mut norms = vec![None; adapters.len()];
    for (position, factors) in &factors {
        task.check()?;
        let (position, update) = (*position, factors.update()?);
        let norm = frobenius_norm(&update);
        norms[position] = Some(norm);
        members.push(Member { position, update, norm, bases: None });
    }
    let shape = members.first().map_or([0, 0], |m| [m.update.rows(), m.update.columns()]);
    if members.len() > 1 {
        for member in &mut members {
            task.check()?;
            member.bases = SingularBases::of(&member.update);
        }
    }
    let mut pairs = Vec::new();
    let mut clashes = Vec::new();
    for (index, x) in members.iter().enumerate() {
        for y in &members[index + 1..] {
            task.check()?;
            if (x.update.rows(), x.update.columns()) == (y.update.rows(), y.update.columns()) {
                pairs.push(compare_pair(x, y)?);
            } else {
                clashes.push((x.position, y.position));
                notes.push(format!(
                    "module {path} updates a weight of shape [{}, {}] in {} but of shape [{}, {}] \
                     in {}; they were not made for one model",
                    x.update.rows(),
                    x.update.columns(),
                    adapters[x.position].path().display(),
                    y.update.rows(),
                    y.update.columns(),
                    adapters[y.position].path().display(),
                ));
            }
        }
    }
    let ranks = modules.iter().map(|module| module.map(|module| module.rank)).collect();
    let module = ModuleComparison { path: path.to_owned(), shape, norms, ranks, pairs };
    Ok(Compared { module, notes, clashes })
}

fn compare_pair(x: &Member<'_>, y: &Member<'_>) -> Result<PairComparison> {
    let product = inner_product(&x.update, &y.update)?;
    let difference = difference_norm(&x.update, &y.update)?;
    // One seed for all: what is drawn depends on nothing but the shape.
    let signs = sign_agreement(&x.update, &y.update, SIGN_SAMPLES, 0)?;
    let mut pair = PairComparison {
        first: x.position,
        second: y.position,
        inner_product: product,
        cosine: cosine_of(product, [x.norm, y.norm]),
        relative_difference: difference / x.norm.max(y.norm),
        sign_agreement: signs.share,
        sign_sampled: signs.sampled,
        sizes: [Vec::new(), Vec::new()],
        output_phi: Vec::new(),
        output_expected: Vec::new(),
        input_phi: Vec::new(),
        input_expected: Vec::new(),
        output_angles: Vec::new(),
        input_angles: Vec::new(),
    };
    if let (Some(left), Some(right)) = (&x.bases, &y.bases) {
        pair.sizes = [sizes(left.rank()), sizes(right.rank())];
        let output = left.left_similarity(right)?;
        let input = left.right_similarity(right)?;
        (pair.output_phi, pair.output_expected) = grid(&output, &pair.sizes);
        (pair.input_phi, pair.input_expected) = grid(&input, &pair.sizes);
        if left.rank() > 0 && right.rank() > 0 {
            let (i, j) = (left.rank(), right.rank());
            pair.output_angles = left.left_angles(right, i, j)?.angles;
            pair.input_angles = left.right_angles(right, i, j)?.angles;
        }
    }
    Ok(pair)
}

/// The powers of two up to a rank, and the rank.
fn sizes(rank: usize) -> Vec<usize> {
    let powers = (0..).map(|power| 1 << power).take_while(|&size| size < rank);
    powers.chain((rank > 0).then_some(rank)).collect()
}

fn grid(
    similarity: &SubspaceSimilarity,
    sizes: &[Vec<usize>; 2],
) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let table = |of: &dyn Fn(usize, usize) -> f64| {
        sizes[0].iter().map(|&i| sizes[1].iter().map(|&j| of(i, j)).collect()).collect()
    };
    let phi = |i, j| similarity.phi(i, j).unwrap_or(f64::NAN);
    (table(&phi), table(&|i, j| similarity.expected(i, j)))
}
