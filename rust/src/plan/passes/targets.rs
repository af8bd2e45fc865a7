//! The pass that finds the targets: the parameter of the model that each module of an adapter changes,
//! and which way a product lies on experts that are stored as one tensor.

use std::collections::HashMap;
use std::ops::Range;

use indexmap::IndexMap;

use crate::adapter::{
    Adapter, Expert, LayerKind, Module, Parameter, TransposedExperts, expert_factors,
};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::renames::{NameIndex, SliceIndex};
use crate::error::Result;
use crate::limits;
use crate::parallel::task::Task;
use crate::plan::update::{ExpertLayout, Slice, UpdateKind};
use crate::tensor::orientation::Orientation;

/// Model types of transformers whose experts take their weights as (in, out).
const TRANSPOSED_MODELS: [&str; 4] = ["gpt_oss", "aria", "aria_text", "openai_privacy_filter"];
/// Those whose experts' weights transformers transposes as it loads them, unless they are already.
const STORED_EITHER_WAY: [&str; 2] = ["qwen3_vl_moe", "qwen3_vl_moe_text"];
/// The order in which experts' parameters are registered, which is the order of PEFT's wrappers.
const REGISTRATION: [&str; 4] = ["gate_up_proj", "gate_proj", "up_proj", "down_proj"];

/// The parameter that a module changes.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Target {
    /// Its name in the model that was trained.
    pub parameter: String,
    /// How the product lies on it, where the factors were made for the parameter as it is stored;
    /// else the layer decides.
    pub layout: Option<ExpertLayout>,
    /// Where each expert's product belongs to a parameter of its own: their names.
    pub experts: Option<ExpertNames>,
    /// The rank and the scale, which can depend on the parameter's name.
    pub rank: u64,
    /// As for the rank.
    pub scale: f64,
}

/// Where the matrices of a model's experts lie that a module has the factors of.
#[derive(Debug, Clone)]
pub(in crate::plan) enum ExpertNames {
    /// Each expert has a parameter of its own.
    OneByOne {
        /// The path of the experts.
        path: String,
        /// What follows an expert's number.
        matrix: String,
    },
    /// All have one, in which the gate's rows of an expert stand above those upwards.
    Fused {
        /// Its name.
        parameter: String,
        /// Which of the two the rows are.
        slot: usize,
    },
}

impl ExpertNames {
    /// The parameter of one expert.
    pub fn parameter(&self, index: u64) -> String {
        match self {
            Self::OneByOne { path, matrix } => format!("{path}.{index}.{matrix}.weight"),
            Self::Fused { parameter, .. } => parameter.clone(),
        }
    }

    /// Which rows of that parameter are the expert's, where it is not its own.
    pub fn slice(&self, index: u64) -> Option<SliceIndex> {
        match self {
            Self::OneByOne { .. } => None,
            Self::Fused { slot, .. } => {
                Some(SliceIndex { expert: Some(index), slot: *slot, slots: 2, alike: 0..2 })
            }
        }
    }
}

/// A module and the parameter that it changes.
#[derive(Debug, Clone, Copy)]
pub(in crate::plan) struct TargetedModule<'a> {
    pub module: &'a Module,
    pub target: &'a Target,
}

impl TargetedModule<'_> {
    /// What its product does to the parameter.
    pub fn kind(&self) -> UpdateKind {
        match (self.module.delta.transform(), &self.module.magnitude) {
            (Some(_), _) => UpdateKind::Transform,
            (None, Some(_)) => UpdateKind::Dora,
            (None, None) => UpdateKind::LowRank,
        }
    }

    /// The rank of its product.
    pub fn rank(&self) -> u64 {
        self.module.product_rank(self.target.rank)
    }

    /// The factor on its product.
    pub fn scale(&self) -> f64 {
        self.target.scale * self.module.repeats()
    }
}

/// The targets of an adapter by its modules' keys, and in words what was not found.
pub(in crate::plan) struct FoundTargets {
    pub targets: IndexMap<String, Target>,
    pub problems: Vec<String>,
}

/// Finds the parameter of every module, by the module's key; or says in words why not.
///
/// # Errors
/// [`crate::Error::Cancelled`], and [`crate::Error::Adapter`] for patterns of the config that take too
/// many steps.
pub(in crate::plan) fn find(
    adapter: &Adapter,
    names: &NameIndex<'_>,
    asked: Option<ExpertLayout>,
    task: &Task,
) -> Result<FoundTargets> {
    let mut targets = IndexMap::new();
    let mut problems = Vec::new();
    // What names its parameter is told apart by it from others of its path.
    let mut groups = IndexMap::<(&str, &str, Option<&str>), Vec<&Module>>::new();
    for module in adapter.modules().values() {
        let own = module.only_parameter().map(|parameter| parameter.name.as_str());
        groups.entry((&module.path, module.leaf(), own)).or_default().push(module);
    }
    for ((path, ..), mut modules) in groups {
        task.check()?;
        // The innermost wrapper first.
        modules.sort_by_key(|module| std::cmp::Reverse(module.key.len()));
        let parameters = parameters(names, &modules);
        if parameters.is_empty() {
            match modules.as_slice() {
                [module] if let Some(target) = stacked(names, module) => {
                    targets.insert(module.key.clone(), target);
                }
                [module] if !module.delta.holds_experts() => {
                    targets.insert(module.key.clone(), plain(names, module));
                }
                _ => problems.push(unknown_parameter(&modules, names.base().noun())),
            }
            continue;
        }
        match assign(&modules, &parameters) {
            Ok(found) => targets.extend(found),
            Err(problem) => problems.push(format!("its module {path} {problem}")),
        }
    }
    for problem in resolve_layouts(adapter, names.base(), asked, &mut targets) {
        problems.push(problem);
    }
    Ok(FoundTargets { targets, problems })
}

/// A layer's own weight.
fn plain(names: &NameIndex<'_>, module: &Module) -> Target {
    let path = &module.path;
    let weight = format!("{path}.{}", module.leaf());
    // torch's MultiheadAttention has no weight but this one.
    let attention = format!("{path}.in_proj_weight");
    let has = |name: &str| find_shape(names, name).is_some();
    let is_attention = module.kind == LayerKind::Linear && !names.has(&weight) && has(&attention);
    let parameter = if is_attention && !has(&weight) { attention } else { weight };
    let (rank, scale) = (module.rank, module.scaling);
    Target { parameter, layout: None, experts: None, rank, scale }
}

/// The target of one matrix of all experts, where the base has it under another name than the adapter:
/// in one tensor, or a tensor for each expert.
fn stacked(names: &NameIndex<'_>, module: &Module) -> Option<Target> {
    let own = module.only_parameter()?;
    let target = |parameter, layout, experts| Target {
        parameter,
        layout,
        experts,
        rank: module.rank,
        scale: module.scaling,
    };
    let Module { key, path, .. } = module;
    let others = expert_factors::names_of_matrix(&own.name);
    let stacked =
        others.iter().flat_map(|name| [format!("{path}.{name}"), format!("{path}.{name}.weight")]);
    for parameter in stacked.chain([format!("{key}.weight")]) {
        let Some(shape) = find_shape(names, &parameter).filter(|shape| shape.len() == 3) else {
            continue;
        };
        match layouts(module, own, &shape)[..] {
            [] => {}
            [layout] => return Some(target(parameter, Some(layout), None)),
            // Layers have their weights as (out, in); of other parameters the model decides.
            _ if parameter.ends_with(".weight") => {
                return Some(target(parameter, Some(ExpertLayout::Straight), None));
            }
            _ => return Some(target(parameter, None, None)),
        }
    }
    for matrix in others {
        let experts = ExpertNames::OneByOne { path: path.clone(), matrix: matrix.to_owned() };
        let first = experts.parameter(0);
        let canonical = names.canonical(&first).name;
        if names.has(&canonical) || names.with_other_prefix(&canonical).is_some() {
            return Some(target(first, None, Some(experts)));
        }
    }
    // In a model that no rule tells of.
    let parameter = format!("{path}.{}", REGISTRATION[0]);
    let is_fused = find_shape(names, &parameter).is_some_and(|shape| {
        matches!(*shape, [_, rows, columns] if (rows, columns) == (2 * module.outputs(), module.inputs()))
    });
    let takes_transposed =
        names.base().config().is_some_and(|config| names_one_of(config, &TRANSPOSED_MODELS));
    let slot =
        expert_factors::slot_of_matrix(&own.name).filter(|_| is_fused && !takes_transposed)?;
    let experts = ExpertNames::Fused { parameter: parameter.clone(), slot };
    Some(target(parameter, None, Some(experts)))
}

/// The shape of the tensor of that name, or of one whose name differs by a leading part.
fn find_shape(names: &NameIndex<'_>, parameter: &str) -> Option<Vec<u64>> {
    let name = names.canonical(parameter).name;
    if names.has(&name) {
        return names.shape(&name);
    }
    names.with_other_prefix(&name).and_then(|name| names.shape(name))
}

/// The parameters among the modules' candidates that the base has, in the order in which PEFT
/// wraps them, as far as it is known.
fn parameters<'a>(names: &NameIndex<'_>, modules: &[&'a Module]) -> Vec<(&'a Parameter, Vec<u64>)> {
    let Some(module) = modules.first() else { return Vec::new() };
    let mut found: Vec<_> = (module.parameters.iter())
        .filter_map(|parameter| {
            let shape = find_shape(names, &format!("{}.{}", module.path, parameter.name))?;
            matches!(shape.len(), 2 | 3).then_some((parameter, shape))
        })
        .collect();
    let position =
        |parameter: &Parameter| REGISTRATION.iter().position(|known| *known == parameter.name);
    if found.iter().all(|(parameter, _)| position(parameter).is_some()) {
        found.sort_by_key(|(parameter, _)| position(parameter));
    }
    found
}

fn unknown_parameter(modules: &[&Module], noun: &str) -> String {
    let module = modules[0];
    let names: Vec<_> = (module.parameters.iter())
        .map(|parameter| format!("{}.{}", module.path, parameter.name))
        .collect();
    match names.as_slice() {
        [] => format!(
            "{} and {} are factors of one module, {}, and its config names no parameters of it \
             (target_parameters)",
            module.delta.tensors()[0].1.name,
            modules[modules.len() - 1].delta.tensors()[0].1.name,
            module.path
        ),
        _ => format!(
            "its module {} fits no tensor of the {noun}, which has no {}",
            module.path,
            names.join(" and no ")
        ),
    }
}

/// How the factors of a module can lie on a parameter of that shape.
fn layouts(module: &Module, parameter: &Parameter, shape: &[u64]) -> Vec<ExpertLayout> {
    let (count, height, width) = match *shape {
        [height, width] => (1, height, width),
        [count, height, width] if count <= limits::EXPERTS => (count, height, width),
        _ => return Vec::new(),
    };
    let [inputs] = module.delta.input_shape()[..] else { return Vec::new() };
    if module.delta.rank() != parameter.rank * count {
        return Vec::new();
    }
    let outputs = module.outputs();
    let mut layouts = Vec::new();
    if (height, width) == (outputs, inputs) {
        layouts.push(ExpertLayout::Straight);
    }
    // One matrix alone is taken as it stands.
    if (width, height) == (outputs, inputs) && (count > 1 || layouts.is_empty() && shape.len() == 3)
    {
        layouts.push(ExpertLayout::Transposed);
    }
    layouts
}

/// Gives each module its parameter: the only way in which the shapes fit, or else the one in the
/// order of registration; or says in words why not.
fn assign(
    modules: &[&Module],
    parameters: &[(&Parameter, Vec<u64>)],
) -> Result<Vec<(String, Target)>, String> {
    let mut fits = Vec::with_capacity(modules.len());
    for module in modules {
        let of_parameter = |(parameter, shape): &(&Parameter, Vec<u64>)| {
            !layouts(module, parameter, shape).is_empty()
        };
        fits.push(parameters.iter().map(of_parameter).collect::<Vec<_>>());
    }
    let mut search = Search { fits: &fits, way: Vec::new(), ways: Vec::new(), steps: 0 };
    if !search.run() {
        return Err(format!(
            "has {} pairs of factors, which fit {} parameters in too many ways; train each in an \
             adapter of its own",
            modules.len(),
            parameters.len()
        ));
    }
    let ways = search.ways;
    let in_order: Vec<_> = (0..modules.len()).collect();
    let known =
        parameters.iter().all(|(parameter, _)| REGISTRATION.contains(&parameter.name.as_str()));
    let way = match ways.as_slice() {
        [way] => way,
        [] => {
            return Err(format!(
                "has factors of shapes {}, which fit none of the base's {}",
                modules.iter().map(|module| shapes_of(module)).collect::<Vec<_>>().join(", "),
                parameters
                    .iter()
                    .map(|(parameter, shape)| format!("{} of shape {shape:?}", parameter.name))
                    .collect::<Vec<_>>()
                    .join(" and ")
            ));
        }
        ways if known && ways.contains(&in_order) => &in_order,
        _ => {
            return Err(format!(
                "has factors that fit {} in more than one way, and nothing tells which is meant; \
                 merge with PEFT, or train each in an adapter of its own",
                (parameters.iter().map(|(parameter, _)| parameter.name.as_str()))
                    .collect::<Vec<_>>()
                    .join(" and ")
            ));
        }
    };
    let target = |(module, position): (&&Module, &usize)| {
        let (chosen, shape) = &parameters[*position];
        let parameter = format!("{}.{}", module.path, chosen.name);
        let layouts = layouts(module, chosen, shape);
        let layout = if let [layout] = layouts[..] { Some(layout) } else { None };
        let (rank, scale) = (chosen.rank, chosen.scaling);
        (module.key.clone(), Target { parameter, layout, experts: None, rank, scale })
    };
    Ok(modules.iter().zip(way).map(target).collect())
}

/// The shapes of a module's factors, for a message.
fn shapes_of(module: &Module) -> String {
    let shapes: Vec<_> =
        (module.delta.tensors().iter()).map(|(_, tensor)| format!("{:?}", tensor.shape)).collect();
    shapes.join(" and ")
}

/// The search for all ways of giving each module a parameter of its own.
struct Search<'a> {
    /// For each module, which parameters fit it.
    fits: &'a [Vec<bool>],
    /// The parameters of the first modules, as they are tried.
    way: Vec<usize>,
    ways: Vec<Vec<usize>>,
    steps: usize,
}

impl Search<'_> {
    /// Whether the search came to its end within its steps.
    fn run(&mut self) -> bool {
        self.steps += 1;
        if self.steps > limits::ASSIGNMENTS {
            return false;
        }
        let Some(fits) = self.fits.get(self.way.len()) else {
            self.ways.push(self.way.clone());
            return true;
        };
        for (position, _) in fits.iter().enumerate().filter(|(_, fits)| **fits) {
            if self.way.contains(&position) {
                continue;
            }
            self.way.push(position);
            let ended = self.run();
            self.way.pop();
            if !ended {
                return false;
            }
        }
        true
    }
}

/// Decides the layout of square experts: as their neighbours', which shapes have decided; as the
/// version of PEFT lays them; as asked for.
fn resolve_layouts(
    adapter: &Adapter,
    base: &Checkpoint,
    asked: Option<ExpertLayout>,
    targets: &mut IndexMap<String, Target>,
) -> Vec<String> {
    let is_open = |key: &str, target: &Target| {
        let is_decided = target.layout.is_some() || target.experts.is_some();
        !is_decided && adapter.modules()[key].delta.holds_experts()
    };
    if !targets.iter().any(|(key, target)| is_open(key, target)) {
        return Vec::new();
    }
    let leaf = |key: &str| adapter.modules()[key].path.rsplit('.').next().unwrap_or("");
    let mut decided = HashMap::<&str, ExpertLayout>::new();
    for (key, target) in targets.iter() {
        if let Some(layout) = target.layout {
            decided.entry(leaf(key)).or_insert(layout);
        }
    }
    let told = adapter.semantics().transposed_experts;
    let mut problems = Vec::new();
    for (key, target) in targets.iter_mut().filter(|(key, target)| is_open(key, target)) {
        let told = match adapter.modules()[key].delta.is_of_layers() {
            true => Some(TransposedExperts::IfStoredTransposed),
            false => told,
        };
        let neighbor = decided.get(leaf(key)).copied();
        target.layout = asked.or(neighbor).or_else(|| by_model(told?, base));
        if target.layout.is_none() {
            problems.push(format!(
                "its factors of {} fit its square experts both ways, and nothing tells which \
                 (peft_version in the config would); say so by the option expert_layout",
                target.parameter
            ));
        }
    }
    problems
}

/// How experts lie by what the adapter tells and the model that was trained.
fn by_model(told: TransposedExperts, base: &Checkpoint) -> Option<ExpertLayout> {
    let is_one_of = |models| base.config().is_some_and(|config| names_one_of(config, models));
    if is_one_of(&STORED_EITHER_WAY[..]) {
        return None;
    }
    let takes_transposed = is_one_of(&TRANSPOSED_MODELS[..]);
    let transposed = match told {
        TransposedExperts::Always => true,
        TransposedExperts::UnlessStoredTransposed => !takes_transposed,
        TransposedExperts::IfStoredTransposed => takes_transposed,
    };
    Some(if transposed { ExpertLayout::Transposed } else { ExpertLayout::Straight })
}

/// Whether the experts of a model with that config take their weights as (in, out).
pub(crate) fn takes_experts_transposed(
    config: &serde_json::Map<String, serde_json::Value>,
) -> bool {
    names_one_of(config, &TRANSPOSED_MODELS)
}

fn names_one_of(config: &serde_json::Map<String, serde_json::Value>, models: &[&str]) -> bool {
    let own = config.get("model_type").and_then(serde_json::Value::as_str);
    own.is_some_and(|name| models.contains(&name))
        || config
            .values()
            .filter_map(serde_json::Value::as_object)
            .any(|inner| names_one_of(inner, models))
}

/// The slices of a product on a whole parameter of that shape: one for each run of rows on which it
/// can be other than zero, where not on all.
pub(in crate::plan) fn changed_slices(
    module: &Module,
    shape: &[u64],
    orientation: Orientation,
) -> Vec<Slice> {
    let runs = module.delta.changed_outputs();
    let is_whole = runs.iter().map(|run| run.end - run.start).sum::<u64>() == module.outputs();
    // What adds nothing but its product lies on rows; a rescaling, or what a start took out, on all.
    if is_whole
        || module.magnitude.is_some()
        || shape.len() != 2
        || orientation == Orientation::InOut
    {
        return vec![Slice::default()];
    }
    let slice =
        |run: Range<u64>| Slice { outputs: Some(run.clone()), rows: Some(run), ..Slice::default() };
    runs.into_iter().map(slice).collect()
}

/// The slices of a product on a parameter of that shape: one an expert.
pub(in crate::plan) fn expert_slices(module: &Module, shape: &[u64]) -> Vec<Slice> {
    let [count, height, _] = *shape else { return vec![Slice::default()] };
    let is_stacked = module.delta.holds_experts();
    (0..count)
        .map(|index| Slice {
            expert: is_stacked.then_some(Expert { index, count }),
            rows: Some(index * height..(index + 1) * height),
            ..Slice::default()
        })
        .collect()
}
