use super::features::Version;
use super::*;
use crate::adapter::coverage;

fn config(text: &str) -> Result<PeftConfig> {
    let raw = serde_json::from_str(text).expect("JSON");
    PeftConfig::from_fields(Path::new("adapter_config.json"), raw)
}

fn complaint(text: &str) -> String {
    config(text).expect_err("a broken config").to_string()
}

#[test]
fn patterns_match_as_in_peft() {
    let config = config(
        r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16,
            "rank_pattern": {"q_proj": 4, "model.layers.0.self_attn.k_proj": 2,
                             ".*\\.(?!1\\.)\\d+\\.mlp\\.up": 32},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 1.5, "q_proj": 3}}"#,
    )
    .expect("sound");
    let rank = |path: &str| config.rank_of(path, path).expect("few steps");
    let alpha = |path: &str| config.alpha_of(path, path).expect("few steps");
    assert_eq!(rank("model.layers.7.self_attn.q_proj"), 4);
    assert_eq!(rank("q_proj"), 4);
    assert_eq!(rank("model.layers.7.self_attn.qq_proj"), 8);
    assert_eq!(rank("model.layers.0.self_attn.k_proj"), 2);
    assert_eq!(rank("model.layers.0.mlp.up"), 32);
    assert_eq!(rank("model.layers.1.mlp.up"), 8);
    assert_eq!(alpha("model.layers.1.self_attn.q_proj"), 1.5);
    assert_eq!(alpha("model.layers.11.self_attn.q_proj"), 3.0);
    assert_eq!(alpha("model.layers.1.self_attn.v_proj"), 16.0);
}

#[test]
fn the_scale_is_alpha_over_rank_or_its_root() {
    let plain = config(r#"{"peft_type": "LORA", "r": 16, "lora_alpha": 8}"#).expect("sound");
    assert_eq!(plain.scaling(8.0, 16), 0.5);
    let stabilized =
        config(r#"{"peft_type": "LORA", "r": 16, "lora_alpha": 8, "use_rslora": true}"#)
            .expect("sound");
    assert_eq!(stabilized.scaling(8.0, 16), 2.0);
}

#[test]
fn broken_settings_are_named() {
    assert!(complaint(r#"{"r": 8}"#).contains("no peft_type"));
    assert!(complaint(r#"{"peft_type": "BOFT"}"#).contains("is a BOFT adapter"));
    assert!(complaint(r#"{"peft_type": "OFT"}"#).contains("before 0.14"));
    let rotated =
        |rest: &str| complaint(&format!(r#"{{"peft_type": "OFT", "oft_block_size": 4{rest}}}"#));
    assert!(rotated("").contains("before 0.18"));
    assert!(rotated(r#", "peft_version": "0.17.1""#).contains("before 0.18"));
    assert!(
        rotated(r#", "peft_version": "0.18.0", "num_cayley_neumann_terms": 0"#)
            .contains("whole number")
    );
    assert!(rotated(r#", "use_cayley_neumann": false, "coft": true, "eps": "x""#).contains("eps"));
    assert!(complaint(r#"{"fine_tune_type": "lora"}"#).contains("MLX"));
    let with = |rest: &str| complaint(&format!(r#"{{"peft_type": "LORA", {rest}}}"#));
    assert!(with(r#""lora_alpha": 8"#).contains("has no r"));
    assert!(with(r#""r": 0, "lora_alpha": 8"#).contains("sets r to 0"));
    assert!(with(r#""r": -4, "lora_alpha": 8"#).contains("sets r to -4"));
    assert!(with(r#""r": 8"#).contains("has no lora_alpha"));
    assert!(with(r#""r": 8, "lora_alpha": "x""#).contains("finite number"));
    assert!(with(r#""r": 8, "lora_alpha": 8, "use_rslora": 1"#).contains("true or false"));
    assert!(
        with(r#""r": 8, "lora_alpha": 8, "rank_pattern": {"(": 1}"#).contains("invalid expression")
    );
    assert!(
        with(r#""r": 8, "lora_alpha": 8, "rank_pattern": {"q": 0}"#)
            .contains(r#"rank_pattern["q"]"#)
    );
}

#[test]
fn what_would_change_the_result_is_an_obstacle() {
    let obstacles = |rest: &str, allow: &[&str]| {
        let allow: Vec<_> = allow.iter().map(|field| (*field).to_owned()).collect();
        let text = format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, {rest}}}"#);
        let uses = config(&text).expect("sound").uses();
        coverage::refused(&coverage::allowed(&uses, &allow))
    };
    let harmless = r#""bias": "none", "init_lora_weights": true, "eva_config": null,
        "loftq_config": {}, "use_dora": false, "target_modules": ["q"], "alpha": 16"#;
    assert_eq!(obstacles(harmless, &[]), Vec::<String>::new());
    assert!(obstacles(r#""use_qalora": true"#, &[])[0].contains("QALoRA (use_qalora)"));
    assert_eq!(obstacles(r#""init_lora_weights": "pissa_niter_4""#, &[]), Vec::<String>::new());
    let changed = r#""init_lora_weights": "lora_ga""#;
    assert!(obstacles(changed, &[])[0].contains("lora_ga"));
    assert!(obstacles(changed, &["init_lora_weights"]).is_empty());
    let split = r#""megatron_config": {"tensor_model_parallel_size": 2}"#;
    assert!(obstacles(split, &[])[0].contains("one of 2 parts"));
    assert!(obstacles(r#""megatron_config": {"hidden_size": 2}"#, &[]).is_empty());
    assert!(obstacles(r#""alpha": 4"#, &[])[0].contains("beside lora_alpha"));
    assert!(obstacles(r#""new_thing": 3"#, &[])[0].contains("unknown config field new_thing"));
    assert!(obstacles(r#""new_thing": 3"#, &["new_thing"]).is_empty());
    assert!(obstacles(r#""new_thing": null"#, &[]).is_empty());
}

#[test]
fn settings_of_features_are_read() {
    let features = |rest: &str| {
        let text = format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, {rest}}}"#);
        config(&text).map(|config| config.features().clone())
    };
    let read = features(
        r#""target_parameters": ["mlp.experts.down", "mlp.experts.gate", "bare", "perts.other"],
           "trainable_token_indices": {"embed": [5, 2], "head": []},
           "peft_version": "0.19.1.dev0@abc""#,
    )
    .expect("sound");
    let parameters = |path: &str| read.target_parameters.of_module(path).expect("few");
    assert_eq!(parameters("a.mlp.experts"), ["bare", "down", "gate"]);
    assert_eq!(parameters("mlp.experts"), ["bare", "down", "gate"]);
    assert_eq!(parameters("a.mlps.experts"), ["bare"]);
    let tokens = read.tokens.as_ref().expect("set");
    assert_eq!(tokens.rows_of("model.embed"), Some(&[5, 2][..]));
    assert_eq!(tokens.rows_of("model.other"), None);
    assert_eq!(read.version, Some(Version { release: (0, 19, 1), development: true }));
    let broken = |rest: &str| features(rest).expect_err("broken").to_string();
    assert!(broken(r#""trainable_token_indices": [1, -2]"#).contains("at least 0"));
    assert!(broken(r#""trainable_token_indices": [1, 2, 1]"#).contains("the token 1 twice"));
    assert!(broken(r#""target_parameters": "x""#).contains("list of names"));
    assert!(broken(r#""use_bdlora": {"nblocks": 0}"#).contains("at least 1"));
    assert!(broken(r#""enable_lora": [false]"#).contains("not all false"));
}
