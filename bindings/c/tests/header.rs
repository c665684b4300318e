//! `pillion.h` is what cbindgen makes of the sources. `PILLION_UPDATE=1 cargo test -p pillion-c`
//! writes it.

use std::path::Path;

#[test]
fn the_header_is_up_to_date() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(folder).with_config(config).generate().unwrap();
    let mut made = Vec::new();
    bindings.write(&mut made);
    let (made, file) = (String::from_utf8(made).unwrap(), folder.join("pillion.h"));
    if std::env::var_os("PILLION_UPDATE").is_some() {
        std::fs::write(&file, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(kept == made, "{} differs from the sources: PILLION_UPDATE=1 cargo test -p pillion-c", file.display());
}
