//! The command `pillion`.
#![forbid(unsafe_code)]

fn main() {
    let arguments: Result<Vec<String>, _> = std::env::args_os().map(|argument| argument.into_string()).collect();
    let code = match arguments {
        Ok(arguments) => pillion_llama::main(&arguments),
        Err(argument) => {
            eprintln!("pillion: the argument {} is not UTF-8", argument.display());
            2
        }
    };
    std::process::exit(code);
}
