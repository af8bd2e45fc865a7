//! LoHa, LoKr and IA3 as PEFT lays them out: which modules its one config of each can describe, and
//! their tensors in the shapes that it makes of that config.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Map, Value, json};

use super::config::Method;
use crate::adapter::computed;
use crate::adapter::factors::common;
use crate::adapter::formats::parts::{self, Hadamard, Kronecker, Part, Spelling};
use crate::adapter::matrix::Matrix;
use crate::adapter::{LayerKind, Module};
use crate::error::Result;
use crate::limits;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// Modules as the tensors of one of PEFT's methods.
#[derive(Debug)]
pub(super) struct Laid {
    pub method: Method,
    pub modules: Vec<LaidModule>,
    /// What the method's config says beside ranks and alphas.
    pub settings: Map<String, Value>,
}

/// One module of them.
#[derive(Debug)]
pub(super) struct LaidModule {
    /// The rank that the config has to give it.
    pub rank: u64,
    parts: Vec<(Part, Made)>,
}

/// How a tensor is made.
#[derive(Debug)]
enum Made {
    /// As it is stored, in that shape.
    Stored(Tensor, Vec<u64>),
    /// The product of two, in that shape.
    Product(Tensor, Tensor, Vec<u64>),
    /// A core of Tucker's form times its second factor, in that shape.
    Contracted(Tensor, Tensor, Vec<u64>),
    /// The transpose.
    Transposed(Tensor),
    /// The core with both its factors, in that shape.
    Whole([Tensor; 3], Vec<u64>),
}

impl LaidModule {
    /// The tensors with the endings of their names.
    ///
    /// # Errors
    /// That a file changed, [`crate::Error::Io`].
    pub fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let ending = |part| parts::ending(part, Spelling::Peft).expect("a part with a name");
        self.parts.iter().map(|(part, made)| Ok((ending(*part), made.tensor()?))).collect()
    }
}

impl Made {
    fn tensor(&self) -> Result<Tensor> {
        let made = |tensors: &[&Tensor], shape: &[u64], matrix: Matrix| {
            let dtype =
                tensors.iter().fold(tensors[0].dtype.clone(), |all, one| common(&all, &one.dtype));
            // A product of narrow factors has more digits than they.
            let dtype = common(&dtype, &Dtype::F32);
            computed::in_memory(tensors[0], &dtype, shape.to_vec(), &matrix.values)
        };
        match self {
            Self::Stored(tensor, shape) => {
                let mut info = tensor.info().clone();
                info.shape.clone_from(shape);
                Ok(Tensor::new(tensor.file().clone(), info))
            }
            Self::Product(a, b, shape) => {
                made(&[a, b], shape, Matrix::read(a)?.times(&Matrix::read(b)?))
            }
            Self::Contracted(core, b, shape) => {
                let matrix = Matrix::contract(&Matrix::read(core)?, &Matrix::read(b)?);
                made(&[core, b], shape, matrix)
            }
            Self::Transposed(tensor) => {
                let matrix = Matrix::read(tensor)?.transposed();
                let shape = vec![matrix.rows as u64, matrix.columns as u64];
                computed::in_memory(tensor, &tensor.dtype, shape, &matrix.values)
            }
            Self::Whole([core, a, b], shape) => {
                let right = Matrix::contract(&Matrix::read(core)?, &Matrix::read(b)?);
                made(&[core, a, b], shape, Matrix::read(a)?.transposed().times(&right))
            }
        }
    }
}

/// Modules as the method that all of them are of; none where they are all plain factors. `knows_kernels`
/// says whether the inputs of every convolution are told from those of a layer.
///
/// # Errors
/// In words, why no config of PEFT's describes them.
pub(super) fn laid_out<'a>(
    modules: impl Iterator<Item = &'a Module> + Clone,
    knows_kernels: bool,
) -> Result<Option<Laid>, String> {
    let mut found: Option<Method> = None;
    for module in modules.clone() {
        let method = method_of(module);
        match found {
            Some(other) if other != method => {
                return Err(format!(
                    "one adapter of PEFT's is of one method, and this has {} beside {}",
                    method.name(),
                    other.name()
                ));
            }
            _ => found = Some(method),
        }
        let bare = module.magnitude.is_none() && module.bias.is_none();
        if method != Method::Lora && !bare {
            return Err(format!(
                "PEFT's {} has no magnitudes, as there are of {}",
                method.name(),
                module.path
            ));
        }
    }
    match found {
        // Orthogonal factors are read and not written.
        None | Some(Method::Lora | Method::Oft) => Ok(None),
        Some(Method::Ia3) => Ok(Some(scaled(modules))),
        Some(Method::Loha) => hadamard(modules, knows_kernels).map(Some),
        Some(Method::Lokr) => kronecker(modules, knows_kernels).map(Some),
    }
}

/// The method that a module's tensors are of; LoRA, where they are not one of the others'.
fn method_of(module: &Module) -> Method {
    let parts = parts_of(module);
    let has = |is: fn(&Part) -> bool| !parts.is_empty() && parts.keys().all(is);
    let is_layer = matches!(module.kind, LayerKind::Linear | LayerKind::Convolution);
    let is_product = module.delta.transform().is_none();
    if is_layer && is_product && has(|part| matches!(part, Part::Hadamard(_))) {
        Method::Loha
    } else if is_layer && is_product && has(|part| matches!(part, Part::Kronecker(_))) {
        Method::Lokr
    } else if has(|part| matches!(part, Part::Ia3)) {
        Method::Ia3
    } else {
        Method::Lora
    }
}

/// A module's stored tensors by the parts that they play; none where one of them plays none.
fn parts_of(module: &Module) -> HashMap<Part, Tensor> {
    let tensors = module.delta.tensors();
    let part = |(_, tensor): &(&str, &Tensor)| {
        parts::split(&tensor.name).map(|(_, part, _)| (part, (*tensor).clone()))
    };
    tensors.iter().map(part).collect::<Option<_>>().unwrap_or_default()
}

/// The kernel of a convolution, where that is not of one element.
fn wide_kernel(module: &Module) -> Option<Vec<u64>> {
    let kernel = module.delta.input_shape().split_off(1);
    kernel.iter().any(|extent| *extent != 1).then_some(kernel)
}

/// Whether modules in Tucker's form can stay in it: PEFT's one setting (`use_effective_conv2d`) is for
/// every convolution with a kernel.
fn keeps_tucker(cores: &[(bool, &Module)], knows_kernels: bool) -> bool {
    let has_core =
        cores.iter().any(|(has_core, module)| *has_core && wide_kernel(module).is_some());
    let others = || cores.iter().filter(|(has_core, _)| !has_core);
    let is_flat = |module: &Module| {
        wide_kernel(module).is_some() || !knows_kernels && module.delta.may_flatten_kernel()
    };
    has_core && !others().any(|(_, module)| is_flat(module))
}

/// The extents of a core: PEFT has a kernel of one dimension as of two.
fn core_shape(core: &Tensor) -> Vec<u64> {
    let mut shape = core.shape.clone();
    shape.resize(shape.len().max(4), 1);
    shape
}

fn matrix_shape(tensor: &Tensor) -> Vec<u64> {
    vec![tensor.shape[0], tensor.shape[1..].iter().product()]
}

fn stored(tensor: &Tensor) -> Made {
    Made::Stored(tensor.clone(), matrix_shape(tensor))
}

fn hadamard<'a>(
    modules: impl Iterator<Item = &'a Module> + Clone,
    knows_kernels: bool,
) -> Result<Laid, String> {
    use Hadamard::{T1, T2, W1A, W1B, W2A, W2B};
    let has_core = |module: &Module| parts_of(module).contains_key(&Part::Hadamard(T1));
    let cores: Vec<_> = modules.clone().map(|module| (has_core(module), module)).collect();
    let is_effective = keeps_tucker(&cores, knows_kernels);
    let mut laid = Vec::new();
    for module in modules {
        let parts = parts_of(module);
        let part = |part| parts.get(&Part::Hadamard(part));
        let rank = part(W1B).map_or(0, |b| b.shape[0]);
        let mut own = Vec::new();
        for [core, a, b] in [[T1, W1A, W1B], [T2, W2A, W2B]] {
            let (Some(left), Some(right)) = (part(a), part(b)) else {
                return Err(format!("{} lacks a factor", module.path));
            };
            let core_tensor = part(core);
            let is_square = core_tensor.is_none_or(|core| core.shape[..2] == [rank, rank]);
            if right.shape[0] != rank || !is_square {
                return Err(format!(
                    "PEFT's LoHa has one rank for both products, and {} has two",
                    module.path
                ));
            }
            match core_tensor {
                None => own.extend([(a, stored(left)), (b, stored(right))]),
                Some(core_tensor) if core_tensor.shape.len() > 4 => {
                    return Err(format!(
                        "PEFT's LoHa has no kernels of {} dimensions ({})",
                        core_tensor.shape.len() - 2,
                        module.path
                    ));
                }
                Some(core_tensor) if is_effective && wide_kernel(module).is_some() => {
                    let shape = core_shape(core_tensor);
                    own.extend([
                        (core, Made::Stored(core_tensor.clone(), shape)),
                        (a, stored(left)),
                        (b, stored(right)),
                    ]);
                }
                Some(core_tensor) => {
                    let shape = vec![rank, module.inputs()];
                    own.extend([
                        (a, Made::Transposed(left.clone())),
                        (b, Made::Contracted(core_tensor.clone(), right.clone(), shape)),
                    ]);
                }
            }
        }
        let parts = own.into_iter().map(|(part, made)| (Part::Hadamard(part), made)).collect();
        laid.push(LaidModule { rank, parts });
    }
    let settings = object(json!({"use_effective_conv2d": is_effective}));
    Ok(Laid { method: Method::Loha, modules: laid, settings })
}

/// What PEFT has to know of a LoKr's shapes.
struct Sides<'a> {
    module: &'a Module,
    parts: HashMap<Part, Tensor>,
    /// Rows and columns of w1.
    first: [u64; 2],
    /// Rows and channels of w2, without its kernel.
    second: [u64; 2],
    /// The ranks of w1 and of w2, where these are products.
    ranks: [Option<u64>; 2],
}

impl<'a> Sides<'a> {
    fn of(module: &'a Module) -> Result<Self, String> {
        use Kronecker::{T2, W1, W1A, W1B, W2, W2A, W2B};
        let parts = parts_of(module);
        let part = |part| parts.get(&Part::Kronecker(part));
        let side = |whole, a, b, core: Option<&Tensor>| {
            let width = |tensor: &Tensor| tensor.shape[1..].iter().product::<u64>();
            Some(match (part(whole), part(a), part(b), core) {
                (Some(whole), ..) => ([whole.shape[0], width(whole)], None),
                (_, Some(a), Some(b), None) => ([a.shape[0], width(b)], Some(b.shape[0])),
                (_, Some(a), Some(b), Some(core)) => {
                    let kernel = core.shape[2..].iter().product::<u64>();
                    let is_square = core.shape[0] == core.shape[1];
                    is_square.then_some(([width(a), width(b) * kernel], Some(b.shape[0])))?
                }
                _ => return None,
            })
        };
        let found = side(W1, W1A, W1B, None).zip(side(W2, W2A, W2B, part(T2)));
        let Some(((first, rank), (second, other))) = found else {
            return Err(format!("{} has a core that is not square", module.path));
        };
        let kernel = module.delta.input_shape()[1..].iter().product::<u64>().max(1);
        let channels = second[1] / kernel;
        let second = [second[0], channels];
        Ok(Self { module, parts, first, second, ranks: [rank, other] })
    }

    fn outputs(&self) -> u64 {
        self.first[0] * self.second[0]
    }

    fn channels(&self) -> u64 {
        self.first[1] * self.second[1]
    }
}

/// PEFT's cut of an extent into two.
fn cut(dimension: u64, factor: Option<u64>) -> [u64; 2] {
    if let Some(factor) = factor.filter(|factor| dimension.is_multiple_of(*factor)) {
        return [factor, dimension / factor];
    }
    let most = factor.unwrap_or(dimension);
    let [mut m, mut n] = [1, dimension];
    let length = m + n;
    while m < n {
        let Some(next) = (m + 1..=dimension).find(|next| dimension.is_multiple_of(*next)) else {
            break;
        };
        if next + dimension / next > length || next > most {
            break;
        }
        [m, n] = [next, dimension / next];
    }
    [m.min(n), m.max(n)]
}

/// The `decompose_factor` that makes PEFT cut every module as it is cut; `Some(None)` is its default.
fn decompose_factor(all: &[Sides<'_>]) -> Option<Option<u64>> {
    let mut cuts = BTreeSet::new();
    for sides in all {
        cuts.insert((sides.outputs(), sides.first[0]));
        cuts.insert((sides.channels(), sides.first[1]));
    }
    let widest = cuts.iter().map(|(_, width)| *width).max()?;
    let extents = cuts.iter().map(|(_, width)| *width);
    let tried = [None].into_iter().chain(extents.chain(1..=widest.min(1024) * 2).map(Some));
    let fits = |factor: Option<u64>| cuts.iter().all(|(all, width)| cut(*all, factor)[0] == *width);
    let mut tried = tried;
    tried.find(|factor| fits(*factor))
}

/// Which sides of a LoKr stay products, and the rank that the config gives it: PEFT decides that by the
/// rank, and for w1 by its one setting for all (`decompose_both`).
fn kept(sides: &Sides<'_>, decompose_both: bool) -> Option<([bool; 2], u64)> {
    let most = |extents: [u64; 2]| extents[0].max(extents[1]);
    // The least rank at which PEFT has a matrix whole.
    let whole_from = |extents: [u64; 2]| most(extents).div_ceil(2).max(1);
    let (first, second) = (whole_from(sides.first), whole_from(sides.second));
    let is_narrow = |rank: u64, least: u64| rank < least;
    match sides.ranks {
        [_, Some(rank)] if is_narrow(rank, second) => {
            let keeps = decompose_both && is_narrow(rank, first);
            // w1 has to be a product of that very rank then.
            let fits = !keeps || sides.ranks[0] == Some(rank);
            fits.then_some(([keeps, true], rank))
        }
        [Some(rank), _] if decompose_both && is_narrow(rank, first) && !is_narrow(rank, second) => {
            Some(([true, false], rank))
        }
        [_, rank] => {
            let least = if decompose_both { first.max(second) } else { second };
            Some(([false, false], rank.unwrap_or(1).max(least)))
        }
    }
}

fn kronecker<'a>(
    modules: impl Iterator<Item = &'a Module> + Clone,
    knows_kernels: bool,
) -> Result<Laid, String> {
    use Kronecker::{T2, W1, W1A, W1B, W2, W2A, W2B};
    let all = modules.map(Sides::of).collect::<Result<Vec<_>, _>>()?;
    let Some(factor) = decompose_factor(&all) else {
        return Err("PEFT's LoKr cuts every module by one decompose_factor, and these are cut \
                    otherwise"
            .into());
    };
    let with = |decompose_both: bool| {
        all.iter().map(|sides| kept(sides, decompose_both)).collect::<Option<Vec<_>>>()
    };
    let has_products = all.iter().any(|sides| sides.ranks[0].is_some());
    let both = if has_products { with(true) } else { None };
    let decompose_both = both.is_some();
    let Some(kept) = both.or_else(|| with(false)) else {
        return Err("PEFT's LoKr has other ranks than these".into());
    };
    let cores: Vec<_> = (all.iter().zip(&kept))
        .filter(|(_, (kept, _))| kept[1])
        .map(|(sides, _)| (sides.parts.contains_key(&Part::Kronecker(T2)), sides.module))
        .collect();
    let is_effective = keeps_tucker(&cores, knows_kernels);
    let mut laid = Vec::new();
    for (sides, ([first, second], rank)) in all.iter().zip(kept) {
        let Sides { module, parts, .. } = sides;
        if rank > limits::RANK {
            return Err(format!("{} would need rank {rank}", module.path));
        }
        let kernel = module.delta.input_shape().split_off(1);
        if kernel.len() > 2 {
            return Err(format!("PEFT's LoKr has no kernels of 3 dimensions ({})", module.path));
        }
        let part = |part| parts.get(&Part::Kronecker(part));
        let mut own = match (part(W1), part(W1A), part(W1B)) {
            (Some(whole), ..) => vec![(W1, stored(whole))],
            (_, Some(a), Some(b)) if first => vec![(W1A, stored(a)), (W1B, stored(b))],
            (_, Some(a), Some(b)) => {
                vec![(W1, Made::Product(a.clone(), b.clone(), sides.first.to_vec()))]
            }
            _ => return Err(format!("{} lacks a factor", module.path)),
        };
        let whole_shape = || [&sides.second[..], &kernel].concat();
        let product_shape = || vec![rank, sides.second[1] * kernel.iter().product::<u64>()];
        own.extend(match (part(W2), part(W2A), part(W2B), part(T2)) {
            (Some(whole), ..) => vec![(W2, Made::Stored(whole.clone(), whole_shape()))],
            (_, Some(a), Some(b), None) if second => vec![(W2A, stored(a)), (W2B, stored(b))],
            (_, Some(a), Some(b), None) => {
                vec![(W2, Made::Product(a.clone(), b.clone(), whole_shape()))]
            }
            (_, Some(a), Some(b), Some(core)) => {
                let own = [core, a, b].map(Clone::clone);
                if second && is_effective && wide_kernel(module).is_some() {
                    let shape = core_shape(core);
                    vec![
                        (T2, Made::Stored(core.clone(), shape)),
                        (W2A, stored(a)),
                        (W2B, stored(b)),
                    ]
                } else if second {
                    let [core, a, b] = own;
                    vec![
                        (W2A, Made::Transposed(a)),
                        (W2B, Made::Contracted(core, b, product_shape())),
                    ]
                } else {
                    vec![(W2, Made::Whole(own, whole_shape()))]
                }
            }
            _ => return Err(format!("{} lacks a factor", module.path)),
        });
        let parts = own.into_iter().map(|(part, made)| (Part::Kronecker(part), made)).collect();
        laid.push(LaidModule { rank, parts });
    }
    let factor = factor.map_or(json!(-1), |factor| json!(factor));
    let settings = object(json!({
        "use_effective_conv2d": is_effective,
        "decompose_both": decompose_both,
        "decompose_factor": factor,
        "rank_dropout_scale": false,
    }));
    Ok(Laid { method: Method::Lokr, modules: laid, settings })
}

/// IA3's vectors, whose shapes say what they scale; of the others the path tells.
fn scaled<'a>(modules: impl Iterator<Item = &'a Module>) -> Laid {
    let mut laid = Vec::new();
    let mut feedforward = Vec::new();
    for module in modules {
        let parts = parts_of(module);
        let Some(vector) = parts.get(&Part::Ia3) else { continue };
        if module.delta.transform().is_some_and(|one| !one.changes_bias()) {
            feedforward.push(module.path.clone());
        }
        let made = Made::Stored(vector.clone(), vector.shape.clone());
        laid.push(LaidModule { rank: 1, parts: vec![(Part::Ia3, made)] });
    }
    let settings = object(json!({"feedforward_modules": feedforward}));
    Laid { method: Method::Ia3, modules: laid, settings }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => unreachable!("an object was written down"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_cut_as_peft_cuts_it() {
        for (dimension, factor, expected) in [
            (256, None, [16, 16]),
            (128, None, [8, 16]),
            (127, None, [1, 127]),
            (128, Some(4), [4, 32]),
            (20, Some(8), [4, 5]),
            (50, Some(8), [5, 10]),
            (12, Some(6), [6, 2]),
        ] {
            assert_eq!(cut(dimension, factor), expected, "{dimension} {factor:?}");
        }
    }
}
